#!/usr/bin/env bash
# transformers 5.24.0: the module that `import transformers` gave is not the one that later imports get.
#
# One would guess that there is one module `transformers` in a process, so that what is set on it (a version or a class that a
# test replaces) is what everybody sees. Really the first use of a processor or of a model with pictures runs the package's
# __init__ a second time, and the result takes the first one's place in sys.modules. Whoever imported it before keeps the old
# object; `from transformers import ...` reads the new one.
#
# Prints the version and what was seen; fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet transformers==5.24.0
"$folder/env/bin/python" - <<'PYTHON'
import sys

import transformers

print("transformers", transformers.__version__)
held = transformers
held.__version__ = "set by hand"
before = sys.modules["transformers"] is held
import transformers.processing_utils  # what the first processor loads

after = sys.modules["transformers"] is held
from transformers import __version__ as read

print("the same module before a processor is loaded:", before)
print("the same module afterwards:", after)
print("version set on the module that was imported first:", held.__version__)
print("version that a later import reads:", read)
sys.exit(not (before and not after and read == "5.24.0" and held.__version__ == "set by hand"))
PYTHON
