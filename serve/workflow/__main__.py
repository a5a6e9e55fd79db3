"""The prompt of a workflow's file, for a program that has none of ComfyUI's page.

    python -m serve.workflow FILE --check    whether it can be read
    python -m serve.workflow FILE            its prompt, as JSON; /object_info on standard input

Ends with 1 and one sentence where it cannot be.
"""

import json
import pathlib
import sys

from .exposed import read
from .prompt import to_prompt


def main(arguments: list[str]) -> int:
    path = pathlib.Path(arguments[0])
    try:
        saved = read(path)
        if "--check" in arguments[1:]:
            return 0
        made = {"prompt": saved, "workflow": None}
        if "nodes" in saved:
            made = {"prompt": to_prompt(saved, json.load(sys.stdin)).graph, "workflow": saved}
    except ValueError as reason:
        sys.stderr.write(f"{reason}\n")
        return 1
    json.dump(made, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
