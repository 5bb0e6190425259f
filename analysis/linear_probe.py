"""What a linear probe reads from a state: the facts of the gold chain's step that it stands for.

Logistic regression (scikit-learn) on standardised states, cross-validated: every row is judged by a
probe that has not seen its question. The same probe on shuffled labels says what it finds where
there is nothing; on the question's last state, and on the one that latent 1 is fed (the first
marker's, which no latent has touched), what was known before the first thought.
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engine.evaluation import wilson_interval

FOLDS = 4
LEAST_OF_LABEL = 10  # rows that a label must have; others are left out
ITERATIONS = 100
OPERATOR = re.compile(r"[-+*/×÷^%]")


def facts_of(step: str) -> dict[str, str]:
    """What a step says: of a calculation a+b=c its result and operators, of another step, such as
    an edge of ProsQA, its last word (the node that the path comes to)."""
    left, equals, result = step.strip("<> .").rpartition("=")
    if not equals:
        words = re.findall(r"\w+", step)
        return {"node": words[-1]} if words else {}
    facts = {"result": result.strip()}
    operators = OPERATOR.findall(left.strip().lstrip("-"))
    return facts | ({"operator": "".join(operators)} if operators else {})


def labels_of(rows: Sequence[dict], step: int) -> dict[str, list[str | None]]:
    """For each kind of fact, of each row the fact of its step (from 0); None where it has none."""
    facts = [facts_of(row["steps"][step]) if step < len(row["steps"]) else {} for row in rows]
    kinds = dict.fromkeys(kind for of_row in facts for kind in of_row)
    return {kind: [of_row.get(kind) for of_row in facts] for kind in kinds}


def usable_rows(labels: Sequence[str | None], questions: Sequence[str]) -> np.ndarray | None:
    """The rows to probe: those of labels that are frequent enough, with different questions; None
    where fewer than two are."""
    counts = Counter(label for label in labels if label is not None)
    asked = Counter(label for label, _ in set(zip(labels, questions)))
    frequent = {
        label
        for label, count in counts.items()
        if count >= LEAST_OF_LABEL and asked[label] >= FOLDS  # else a fold may have all of it
    }
    if len(frequent) < 2:
        return None
    return np.flatnonzero([label in frequent for label in labels])


def probe_accuracy(states: np.ndarray, labels: np.ndarray, questions: Sequence[str]) -> dict:
    """Cross-validated accuracy of a probe of states (rows, D), with its 95% Wilson interval.

    Rows with the same question are always in the same fold."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS, tol=1e-3))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    groups = np.unique(np.asarray(questions), return_inverse=True)[1]
    with warnings.catch_warnings():
        # a probe that is not quite at its optimum, or that never saw a label, is a worse probe
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)
        guesses = cross_val_predict(model, states, labels, groups=groups, cv=folds)
    right = int((guesses == labels).sum())
    return {"accuracy": right / len(labels), "interval": wilson_interval(right, len(labels))}


def probe_latents(
    states: np.ndarray, question: np.ndarray, rows: Sequence[dict], c_thought: int, seed: int
) -> list[dict]:
    """A probe of each latent, states (rows, K, D), for the facts of the step that it stands for,
    beside the same of the question's last state (rows, D), of latent 1 and of shuffled labels."""
    results = []
    c_thought = max(c_thought, 1)  # 0: the config has no latents, and a number is forced
    rng = np.random.default_rng(seed)
    texts = np.array([row["question"] for row in rows])
    for step in range(-(-states.shape[1] // c_thought)):
        for kind, labels in labels_of(rows, step).items():
            usable = usable_rows(labels, texts.tolist())
            if usable is None:
                continue
            known = np.array(labels, dtype=object)[usable].astype(str)
            most = max(Counter(known.tolist()).values())
            common = {"step": step + 1, "fact": kind, "rows": len(usable), "most": most}
            common["labels"] = len(set(known.tolist()))
            common["question"] = probe_accuracy(question[usable], known, texts[usable])
            common["first"] = probe_accuracy(states[usable, 0], known, texts[usable])
            for k in range(step * c_thought, min((step + 1) * c_thought, states.shape[1])):
                found = probe_accuracy(states[usable, k], known, texts[usable])
                mixed = probe_accuracy(states[usable, k], rng.permutation(known), texts[usable])
                results.append({"latent": k + 1, **common, "found": found, "shuffled": mixed})
    return results
