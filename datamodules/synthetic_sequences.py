"""Made-up texts of several classes: for smoke tests and demonstrations without data."""

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.counter_rng import generator_seed
from lightning_n2uq.datamodules._data.loading import Split, SplitDataModule
from lightning_n2uq.datamodules._data.tensors import NamedTensorRows
from lightning_n2uq.utils.validation import check_integer, check_number

PADDING = 0


class SyntheticSequencesDataModule(SplitDataModule):
    """Each class is a Markov chain over tokens, for `SequenceClassifier`; everything follows from `seed`.

    A batch is a mapping with `input_ids [B, length]` (token 0 is padding), `attention_mask [B, length]` and
    `labels [B]`, all int64. Tokens alone tell little: what follows what tells the class.

    Args:
        num_classes: The number of classes.
        vocab_size: The number of tokens, padding among them.
        length: The tokens of the longest texts; the shortest have half of it.
        sharpness: How far the chains are from random: the standard deviation of their logits.
        num_train: The number of training texts.
        num_val: The number of validation texts.
        num_test: The number of test texts.
        batch_size: Texts per step and process.
        seed: The seed of chains, texts and order.
        num_workers: Loader processes; 0 is the fastest.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
    """

    samples = "texts"

    def __init__(
        self,
        num_classes: int = 4,
        vocab_size: int = 16,
        length: int = 32,
        sharpness: float = 2.0,
        num_train: int = 1024,
        num_val: int = 128,
        num_test: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        self.num_classes = check_integer("num_classes", num_classes, 2)
        self.vocab_size = check_integer("vocab_size", vocab_size, 3)
        self.length = check_integer("length", length, 4)
        self.sharpness = check_number("sharpness", sharpness, 0.0)
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        for split, count in self.sizes.items():
            check_integer(f"num_{split}", count, 1)

    def sample_bytes(self) -> int:
        """Returns the size of a text with its mask and label."""
        return 8 * (2 * self.length + 1)

    def load_split(self, split: Split) -> NamedTensorRows:
        """Makes the texts of one split."""
        count = self.sizes[split]
        generator = self._generator(1 + list(self.sizes).index(split))
        labels = torch.arange(count) % self.num_classes
        lengths = torch.randint(self.length // 2, self.length + 1, (count, 1), generator=generator)
        mask = (torch.arange(self.length) < lengths).long()
        ids = self._walk(labels, generator).masked_fill(mask == 0, PADDING)
        return NamedTensorRows(input_ids=ids, attention_mask=mask, labels=labels)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(generator_seed(self.seed, stream))

    def _walk(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Walks each label's chain; returns tokens `[N, length]` from 1 on."""
        tokens = self.vocab_size - 1
        logits = torch.randn(self.num_classes, tokens, tokens, generator=self._generator(0))
        chains = (self.sharpness * logits).softmax(-1)
        state = torch.randint(tokens, labels.shape, generator=generator)
        states = [state]
        for _ in range(self.length - 1):
            state = torch.multinomial(chains[labels, state], 1, generator=generator)[:, 0]
            states.append(state)
        return torch.stack(states, 1) + 1
