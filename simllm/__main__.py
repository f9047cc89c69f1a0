"""``python -m simllm``: the same as the ``simllm`` command."""

import sys

from simllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
