"""What only a GPU can show, in one command and without network: tests marked cuda, then engines.

    COMFYUI_PATH=... python benchmarks/gpu.py [--out FOLDER] [--rehearse]

Needs torch with CUDA, ComfyUI, pytest and hypothesis; onnxruntime-gpu and tensorrt are used
where they are. `--rehearse` runs the same on a CPU, with a stand-in for CUDA graphs.
"""

import argparse
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("output"))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    args = parser.parse_args()
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        print("Set COMFYUI_PATH to the folder of a ComfyUI.", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    how = "rehearse" if args.rehearse else "cuda"
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "tests/compiled"],
        cwd=ROOT, env={**os.environ, "LIVEDIFFUSION_CUDA": how},
    ).returncode  # fmt: skip
    engines = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--comfyui", comfyui,
            "--json", str(args.out / "engines.json"),
            *(["--ticks", "8", "--only", "onnxruntime"] if args.rehearse else []),
        ],
    ).returncode  # fmt: skip
    return tests or engines


if __name__ == "__main__":
    sys.exit(main())
