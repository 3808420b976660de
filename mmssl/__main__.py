"""`python -m mmssl` is the command `mmssl`."""

from mmssl.cli import main

main()
