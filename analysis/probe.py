"""A loaded model to ask: one class for everything that the commands of analysis want to know."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from coconut import Coconut, CoconutOutput, EditLatent, embedding_table
from dataset import Batch, StageDataset, collate
from engine.distributed import autocast, open_processes
from engine.preflight import Inputs, build_model, check_prompts, gather_inputs
from engine.text import decode_completion, extract_answer
from utils import Config, load_config

Replacement = tuple[int, Tensor]  # latent k, and the states (rows, D) to feed back there


@dataclass(frozen=True)
class Probe:
    """A checkpoint with the rows to show it."""

    inputs: Inputs
    model: Coconut
    device: torch.device

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def rows(self) -> list[dict]:
        return self.inputs.validation.rows

    def dataset(self, num_latents: int | None) -> StageDataset:
        """The rows at the checkpoint's stage. Raises UserError where they exceed the positions."""
        dataset = self.inputs.validation_dataset(self.inputs.start.epochs_done, num_latents)
        check_prompts([dataset], self.config, self.inputs.hf_config)
        return dataset

    def prompts(self, dataset: StageDataset, rows: list[int]) -> Batch:
        samples = [dataset.question(row) for row in rows]
        return collate(samples, self.inputs.pad_id, align_end=True)

    @torch.no_grad()
    def complete(
        self, dataset: StageDataset, rows: list[int], replaced: Replacement | None = None
    ) -> list[Tensor]:
        """New tokens of each row, batch_size_eval rows together. With a replacement all rows must
        have the same number of latents."""
        size, completions = self.config.batch_size_eval, []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = self.prompts(dataset, part).to(self.device)
            with autocast(self.model, self.config.compute_dtype):
                completions += self.model.generate(
                    batch.input_ids,
                    batch.attention_mask,
                    self.config.max_new_tokens,
                    latent_columns=batch.latent_columns,
                    edit_latent=_edit(replaced, start, start + len(part)),
                )
        return completions

    @torch.no_grad()
    def forward(self, batch: Batch, return_logits: bool = False) -> CoconutOutput:
        """All passes, without a loss."""
        arguments = {**batch.to(self.device).inputs(), "labels": None}
        with autocast(self.model, self.config.compute_dtype):
            return self.model(**arguments, return_logits=return_logits)

    def logits(self, batch: Batch) -> Tensor:
        """Of all positions, (B, T, V)."""
        logits = self.forward(batch, return_logits=True).logits
        assert logits is not None
        return logits

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in float32."""
        with autocast(self.model, self.config.compute_dtype):
            return self.model.base_causallm.get_output_embeddings()(hidden).float()

    def embeddings(self) -> Tensor:
        """The embedding rows (tokens, D) of the tokenizer's tokens but for the latent markers, in
        float32."""
        weight = embedding_table(self.model.base_causallm)
        markers = set(self.inputs.latent_tokens or ())
        ids = [token for token in range(len(self.inputs.tokenizer)) if token not in markers]
        return weight[torch.tensor(ids, device=weight.device)].float()

    def text(self, tokens: Tensor) -> str:
        return decode_completion(self.inputs.tokenizer, tokens)

    def answers(
        self, dataset: StageDataset, rows: list[int], replaced: Replacement | None = None
    ) -> list[str | None]:
        return [extract_answer(self.text(new)) for new in self.complete(dataset, rows, replaced)]


def _edit(replaced: Replacement | None, start: int, stop: int) -> EditLatent | None:
    """The replacement of the rows from start to stop."""
    if replaced is None:
        return None
    k, values = replaced
    return lambda column, state: values[start:stop] if column == k else state


def read_config(*arguments: str) -> Config:
    """The config of YAML files and KEY=VALUE, for an evaluation."""
    config = load_config(*arguments, "only_eval=True")
    # the run folder of a training is no place for anything else
    return dataclasses.replace(config, name=f"{config.name}-analysis")


def load_probe(config: Config, rows: list[dict] | None = None) -> Probe:
    """The checkpoint of a config. rows: to ask in place of those of val_path."""
    inputs = gather_inputs(config, val_rows=rows)
    device = open_processes().device
    return Probe(inputs, build_model(inputs).to(device).eval(), device)
