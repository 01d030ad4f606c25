"""``python -m foveate.eval_suites.speed PART …`` is ``foveate speed PART …``."""

import sys

if __name__ == "__main__":
    from foveate.cli import main

    sys.exit(main(["speed", *sys.argv[1:]]))
