"""The recipes that ship with mmssl: data only. README.md has the table, `mmssl recipes` lists them."""
