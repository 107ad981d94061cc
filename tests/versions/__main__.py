"""The part of tools/check_transformers.sh that this project's own environment does.

python -m tests.versions write ROOT [--tokenizer DIR]    what every version is to load
python -m tests.versions import ROOT                     what every version saved
python -m tests.versions report ROOT [--out FILE]        table; status 1 if something failed
"""

import argparse
import sys
from pathlib import Path

from tests.versions.inputs import write_inputs
from tests.versions.program import write_results
from tests.versions.report import failures, read_results, table
from tests.versions.saved import import_saved


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["write", "import", "report"])
    parser.add_argument("root", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.command == "write":
        write_inputs(options.root, options.tokenizer)
    elif options.command == "import":
        for saved in sorted((options.root / "saved").iterdir()):
            results = import_saved(options.root, saved.name)
            write_results(options.root, saved.name, "3-imported", results)
    else:
        return report(options.root, options.out)
    return 0


def report(root: Path, out: Path | None) -> int:
    """Print the table and write it to a file."""
    found = read_results(root)
    text = table(found)
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    lines = [f"transformers {v}: {line}" for v in found for line in failures(found[v])]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
