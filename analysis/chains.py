"""The positive control: the same noise and exchange on the chain that a CoT model writes.

A CoT model answers every row; what it wrote before the answer's marker is its chain. The chain is
then given to it behind the question, and it goes on from there:

    same         its own chain: what two runs of the same thing differ in
    noise        at every token a random direction with the norm of the token's embedding
    added noise  at every token its embedding plus Gaussian noise of the given sigma
    other        the chain of another row

If these do not change the answers, no intervention on latents that does not says anything either.
"""

from dataclasses import dataclass

from analysis.branches import VECTOR, Branches, join, make_branch, run_branches, run_prefix
from analysis.interventions import Answers, batches_of, noise, with_norm_of
from analysis.probe import Probe
from coconut import embedding_table, token_embeddings
from dataset import StageDataset
from engine.distributed import autocast

KINDS = ("same", "noise", "added noise", "other")


@dataclass(frozen=True)
class Written:
    """All rows as a CoT model answers them."""

    answers: Answers
    chains: list[list[int]]  # the tokens before the marker of the answer


@dataclass(frozen=True)
class Chains:
    """A CoT model on all rows of a data set."""

    probe: Probe
    dataset: StageDataset
    sigma: float

    def batches(self) -> list[list[int]]:
        return batches_of(self.probe, self.dataset)

    def plain(self) -> Written:
        """Let the model answer every row."""
        order = [row for rows in self.batches() for row in rows]
        completions = dict(zip(order, self.probe.complete(self.dataset, order)))
        written = [completions[row].tolist() for row in range(len(self.dataset))]
        return Written(self.probe.read_answers(written), [self._chain(new) for new in written])

    def _chain(self, new: list[int]) -> list[int]:
        """The tokens before the marker, before eos where there is none."""
        probe = self.probe
        if new[-1:] == [probe.inputs.tokenizer.eos_token_id]:
            new = new[:-1]
        chain = len(probe.text(new).partition(probe.text_format.marker)[0])
        size = len(new)
        while len(probe.text(new[:size])) > chain:
            size -= 1
        return new[:size]

    def intervene(self, written: Written, donors: list[int], rows: list[int]) -> dict:
        """Some rows under every intervention: their answers by its name."""
        probe, seed = self.probe, self.probe.config.seed
        own = [written.chains[row] for row in rows]
        base = probe.model.base_causallm
        table, longest = embedding_table(base), max(*map(len, own), 1)
        exact, strange, added = table.new_zeros(3, len(rows), longest, table.shape[1])
        for number, (row, chain) in enumerate(zip(rows, own)):
            if chain:
                embeds = token_embeddings(base, chain)  # (tokens, D)
                drawn = noise(seed, row, 2, *embeds.shape).to(embeds)
                exact[number, : len(chain)] = embeds
                strange[number, : len(chain)] = with_norm_of(drawn[0], embeds)
                added[number, : len(chain)] = embeds + self.sigma * drawn[1]
        others = [written.chains[donors[row]] for row in rows]
        reads = [VECTOR] * longest
        several = [make_branch(own, reads, vectors) for vectors in (exact, strange, added)]
        several.append(make_branch(others, [], exact[:, :0]))
        return {"rows": rows, "answers": dict(zip(KINDS, self._run(rows, several)))}

    def _run(self, rows: list[int], several: list[Branches]) -> list[Answers]:
        """The answers of each branch behind the questions. What it is given counts as written: the
        model's own answers had as many tokens."""
        probe, branches = self.probe, join(several)
        limit = probe.config.max_new_tokens
        batch = probe.prompts(self.dataset, rows).to(probe.device)
        with autocast(probe.model, probe.config.compute_dtype):
            prompt, mask = batch.input_ids, batch.attention_mask
            prefix = run_prefix(probe.model, prompt, mask, room=limit)
            written, _ = run_branches(probe.model, prefix, branches, limit - branches.length)
        return [probe.read_answers(of_branch) for of_branch in zip(*written)]


def same_rows(ours: list[dict], theirs: list[dict]) -> bool:
    """Whether two files hold the same questions and answers in the same order."""
    parts = [[(row["question"], row["answer"]) for row in rows] for rows in (ours, theirs)]
    return parts[0] == parts[1]
