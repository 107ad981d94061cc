"""`opdlm convert` for people who work from a checkout without installing the package.

python tools/convert_checkpoint.py {import,export,verify,inspect} ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_opdlm.cli import main  # noqa: E402  (the checkout must be on the path first)

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
