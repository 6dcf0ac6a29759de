"""`gptfast export`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptfast.cli.options import Count, Run

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Export:
    """Write a model for another project: transformers, llama.cpp or nanoGPT."""

    run_path: Run  # a run of `gptfast train`, its best/, or any other model that gptfast loads
    # a folder, made if missing; for gguf also a file that ends in .gguf
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    # hf: Hugging Face's transformers; gguf: llama.cpp (needs the package gguf); nanogpt: nanoGPT
    to: Literal["hf", "gguf", "nanogpt"]
    n_head: Count = None  # of a file with the course's weights, which do not tell it
    overwrite: bool = False  # write to a folder that is not empty, or over the file

    def run(self) -> int:
        """Writes the model, and says how the other project loads it."""
        from gptfast import formats
        from gptfast.formats.export import check_target, export

        check_target(self.out, self.to, self.overwrite)
        model, tokenizer = formats.load(self.run_path, n_head=self.n_head)
        export(model, tokenizer, self.out, self.to, overwrite=self.overwrite)
        path, load = self._loaded(tokenizer)
        print(f"written  {path}\nload it  {load}")
        return 0

    def _loaded(self, tokenizer: "Tokenizer | None") -> tuple[Path, str]:
        """What was written, and a line that loads it in the other project."""
        if self.to == "gguf":
            from gptfast.formats.gguf import file_of

            file = file_of(self.out)
            return file, f"llama-cli -m {shlex.quote(str(file))} -no-cnv -p TEXT"
        if self.to == "hf":
            return self.out, f"transformers.AutoModelForCausalLM.from_pretrained({str(self.out)!r})"
        folder = self.out.absolute()
        line = f"python sample.py --out_dir={shlex.quote(str(folder))}"
        if tokenizer is not None and tokenizer.unit == "character":
            data = shlex.quote(f"data/{folder.name}")
            meta = shlex.quote(f"{folder / 'meta.pkl'}")
            line = f"mkdir -p {data} && cp {meta} {data} && {line}"
        return self.out, f"{line}  (in nanoGPT's folder)"
