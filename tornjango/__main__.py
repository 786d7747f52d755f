import sys
from pathlib import Path

if (
    not __package__
):  # run by its path, whose folder has modules of this package, and not the package
    sys.path[0] = str(Path(__file__).parent.parent)

from tornjango.cli import main

main()
