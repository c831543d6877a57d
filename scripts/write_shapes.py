"""Write the files of the shapes world that are drawn, not trained: prompts.txt and the concepts' folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowdistill.data.shapes import prompt_list
from flowdistill.data.shapes_concepts import write_concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/shapes"), help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = prompt_list()
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"wrote {len(prompts)} prompts and {', '.join(map(str, write_concepts(args.out / 'concepts')))}")


if __name__ == "__main__":
    main()
