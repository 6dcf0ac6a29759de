"""`gptfast inspect`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from gptfast.cli.options import Count, File, Run
from gptfast.errors import ConfigError


@dataclass(frozen=True)
class Inspect:
    """Show what a model has: parameters, tokenizer, configuration."""

    run_path: Run  # a run of `gptfast train`, a folder of Hugging Face or nanoGPT, or hf:OWNER/NAME
    # show, in tenths, what each character or token of TEXT attends to, and the entropy of that
    attention: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    # show what each head adds at character or token N of TEXT: 0 is the first one, -1 the last
    contributions: Count = None
    # draw the attention, or the contributions where they are asked for, to this picture: .png, .svg
    # or .pdf (needs matplotlib)
    plot: File = None

    def run(self) -> int:
        """Prints the tables."""
        if self.attention is None:
            for option in ("contributions", "plot"):
                if getattr(self, option) is not None:
                    raise ConfigError(f"--{option} needs --attention TEXT")
        if self.plot is not None:
            from gptfast.pictures import check_picture

            check_picture(self.plot)
        from gptfast import formats
        from gptfast.cli.inspection import (
            attention_report,
            lines_of,
            parameter_table,
            tokenizer_line,
        )
        from gptfast.console import Console

        model, tokenizer = formats.load(self.run_path)
        attention = ""
        if self.attention is not None:
            attention = attention_report(
                model, tokenizer, self.attention, self.contributions, self.plot
            )
        Console().print(parameter_table(model))
        print(f"\ntokenizer: {tokenizer_line(tokenizer)}")
        shown = {"config": model.config.to_dict()}
        stored = formats.stored_with(self.run_path)
        if stored is not None:
            shown["extra"] = stored["extra"]
        for title, values in shown.items():
            print(f"\n{title}:")
            for line in lines_of(values):
                print(f"  {line}")
        print(attention, end="")
        return 0
