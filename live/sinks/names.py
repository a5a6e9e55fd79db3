"""Names of files in ComfyUI's output folder, and what is kept in the files."""

import json
import pathlib
from io import FileIO
from typing import Any, NamedTuple

import folder_paths
from comfy.cli_args import args


class Wish(NamedTuple):
    """What a Live View wants of its files.

    Attributes:
        record: its pictures are to be recorded.
        prefix: of their names, below the output folder.
        prompt: the graph that runs, in ComfyUI's API format.
        extra: what came with it, ComfyUI's extra_pnginfo: the workflow.
    """

    record: bool
    prefix: str
    prompt: dict[str, Any] | None
    extra: dict[str, Any] | None

    def metadata(self) -> dict[str, str]:
        """What ComfyUI's own savers put into their files: JSON by name; {} with metadata off."""
        if args.disable_metadata:
            return {}
        kept = {**(self.extra or {}), **({"prompt": self.prompt} if self.prompt else {})}
        return {name: json.dumps(value) for name, value in kept.items()}


class Written(NamedTuple):
    """A file of ours in the output folder.

    Attributes:
        path: the file.
        subfolder: where it is below the output folder, as ComfyUI's /view takes it.
    """

    path: pathlib.Path
    subfolder: str

    @property
    def shown(self) -> str:
        """As people read it."""
        return f"{self.subfolder}/{self.path.name}".lstrip("/")


def reserve(prefix: str, width: int, height: int, suffix: str) -> tuple[Written, FileIO]:
    """A new file with the next number of its prefix, open to be written, of nobody else's name.

    Args:
        prefix: as ComfyUI's savers take it, with %width%, %year% and the like.
        width, height: of the picture, for the prefix.
        suffix: with its dot.

    Raises:
        ValueError: the prefix leads out of the output folder, or is no name.
        OSError: no file can be made there.
    """
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    except OSError:
        raise
    except Exception:
        # ComfyUI has no exception of its own for it, and its message names folders
        raise ValueError(
            f"filename_prefix: {prefix} is not a name inside ComfyUI's output folder. Choose one."
        ) from None
    while True:
        path = pathlib.Path(folder) / f"{name}_{counter:05}_{suffix}"
        try:
            # nobody else gets a file that is made this way, whatever they count
            return Written(path, subfolder), path.open("xb", buffering=0)
        except FileExistsError:
            counter += 1
