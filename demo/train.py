"""Train the embedded model: the client of `python run.py train`.

Prepares pictures and their looks, trains, exports and evaluates; a run that was broken off goes on
with --resume. Uses CUDA if there is one.
"""

import argparse
import pathlib
import subprocess
import sys
import time

from packed import ROOT, comfyui, pack_module


def options():
    parser = argparse.ArgumentParser(prog="run.py train", description="Train the embedded model.")
    parser.add_argument("--comfyui", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("output/training"),
                        help="folder for pictures (8 GB) and checkpoint")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("output/model"),
                        help="folder for the weights (default output/model)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=120, help="of training (default 120)")
    parser.add_argument("--crops", type=int, help="pieces (default 60 per minute, up to 3400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--start", type=pathlib.Path, help="folder of weights to begin with")
    parser.add_argument("--no-evaluation", action="store_true", help="only train")
    args = parser.parse_args()
    if not 0 < args.minutes < 1e6:
        parser.error("--minutes: more than 0, and no more than a million")
    if args.seed < 0:
        parser.error("--seed: 0 or more")
    if args.resume and args.start:
        parser.error("--resume goes on from a checkpoint, --start begins anew: one of them")
    if args.start and not (args.start / "unet.safetensors").is_file():
        parser.error(f"--start: {args.start} holds no unet.safetensors")
    if args.crops is None:
        args.crops = min(3400, max(60, round(60 * args.minutes)))
    if args.crops < 1:
        parser.error("--crops: at least 1")
    return args


class Report:
    """Lines of what happens, with the time."""

    def __init__(self):
        self._start, self._last = time.monotonic(), 0.0

    def __call__(self, line):
        print(f"{time.monotonic() - self._start:6.0f} s  {line}", flush=True)

    def prepared(self, done, total):
        now = time.monotonic()
        if now - self._last > 10 or done == total:
            self._last = now
            self(f"pictures in all looks: {done} of {total}")


def main():
    """Read the options, put ComfyUI on the path, prepare, train, export, evaluate."""
    args = options()
    comfyui(args.comfyui)
    import torch

    pictures, training = pack_module("demo.pictures"), pack_module("demo.training")

    report = Report()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, state = args.work / f"checkpoint_{args.seed}.pt", None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.resume:
        if not checkpoint.is_file():
            raise SystemExit(f"--resume: there is no checkpoint {checkpoint}")
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        args.crops = state["crops"]  # the same pictures, whatever the minutes are now
    data = pictures.prepare(
        pictures.fetched(pictures.CACHE), args.work, args.crops, args.seed, report.prepared
    )
    if device.type == "cuda":
        data = torch.from_numpy(data[:]).to(device)
    trainer = training.Trainer(data, args.minutes, args.seed, device, report)
    if args.start:
        trainer.start_from(args.start)
    if state is not None:
        trainer.resume(state)

    def save():
        part = checkpoint.with_suffix(".part")
        torch.save({**trainer.state(), "crops": args.crops}, part)
        part.replace(checkpoint)

    trainer.run(save)
    training.export(trainer, args.out)
    report(f"weights in {args.out}: {trainer.steps} steps, {trainer.shown:.0f} pictures")
    if not args.no_evaluation:
        command = [sys.executable, str(ROOT / "demo" / "evaluate.py"), "--comfyui", args.comfyui,
                   "--weights", str(args.out), "--out",
                   str(args.out / "evaluation"), "--only", "looks"]  # fmt: skip
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
