import sys
from pathlib import Path

# Run by its path, whose folder has modules of this package, and not the package.
if not __package__:
    sys.path[0] = str(Path(__file__).parent.parent)

from tornjango.cli import main

main()
