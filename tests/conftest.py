"""Settings of every test: nothing is ever fetched."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
