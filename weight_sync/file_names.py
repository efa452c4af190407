"""Names of tensors in Hugging Face's files, where they are not those of the loaded model.

Transformers puts the experts of a layer into one tensor when it loads a model; files have tensors for each of them, and
so does every engine's loader. What travels has the names of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class FileNames:
    """``experts``: the end of a loaded model's name, and the ends in files of what it is made of, ``*`` for the expert's number.

    >>> names = FileNames({"experts.down_proj": ("experts.*.down_proj.weight",)})
    >>> from torch import zeros
    >>> [name for name, _ in names.split("layers.0.experts.down_proj", zeros(2, 3, 4))]
    ['layers.0.experts.0.down_proj.weight', 'layers.0.experts.1.down_proj.weight']
    """

    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model_type: str) -> FileNames:
        """Of an architecture, by the ``model_type`` of its configuration, as transformers loads it.

        Architectures that transformers changes in other ways besides are left with the names of the loaded model.
        """
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        found: dict[str, tuple[str, ...]] = {}
        for rule in get_checkpoint_conversion_mapping(model_type) or ():
            steps = [(type(step).__name__, getattr(step, "dim", 0)) for step in getattr(rule, "operations", ())]
            stacked = steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
            if not stacked or len(rule.target_patterns) != 1:
                return cls()
            found[rule.target_patterns[0]] = tuple(rule.source_patterns)
        return cls(found)

    def split(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor of the loaded model as files have it: views of ``tensor``, [experts, rows, columns], or itself."""
        for end, parts in self.experts.items():
            if name.endswith("." + end):
                for expert, whole in enumerate(tensor):
                    for part, rows in zip(parts, whole.chunk(len(parts)), strict=True):
                        yield name.removesuffix(end) + part.replace("*", str(expert)), rows
                return
        yield name, tensor
