"""One ComfyUI as a process: kept, begun anew, warmed up and measured."""
