# SPDX-License-Identifier: Apache-2.0
"""``python -m latte`` is ``latte``: what torchrun starts."""

from latte.cli.main import main

if __name__ == "__main__":
    main()
