"""What several tests of objectives share."""

import sys
from pathlib import Path

# pairs.py is no test, and importlib puts no folder on the path
sys.path.insert(0, str(Path(__file__).parent))
