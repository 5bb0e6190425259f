"""What the folder of a checkpoint says of itself, to people and to transformers.

    README.md                     the model card, with the front matter that the Hub reads
    generation_config.json        decoding as in this program's evaluation; the latent token's id
    custom_generate/generate.py   generation with thoughts, a copy of engine/custom_generate.py

The last one, and the latent token's id, only where hidden states are fed back.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import GenerationConfig, PreTrainedTokenizerBase

from coconut import END_LATENT, LATENT, START_LATENT
from curriculum import Curriculum
from engine import custom_generate
from engine.text import end_of_text
from rows import hub_name
from utils import Config, Method

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

QUESTION = "Tom has 3 plums. He finds 4 more. How many plums does Tom have?"
CARD = """---
{front_matter}
---

# {name}

- base model: `{model_id}`{adapters}
- method: `{method}`
- epochs done: {epochs}
- stage: {stage}, with {num_latents} latents
- all settings: `config.yaml`

The prompt: the question, a line break{latents}.
The model then writes {steps}`{marker}` and the answer.
{warning}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer{more_imports}

folder = "{name}"  # the path of this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder){own_generation}
prompt = "{question}\\n"{markers}
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False){cut}
output = model.generate(**inputs{arguments})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Several prompts together are padded on the left (`padding_side="left"`).
{more}"""
ADAPTERS = "; this folder holds LoRA adapters over it, which need `pip install peft`"
# the library takes that of the base model
OWN_GENERATION = "\nmodel.generation_config = GenerationConfig.from_pretrained(folder)"
CUT = """
for name in inputs:  # what this tokenizer puts behind a text is no part of a prompt
    inputs[name] = inputs[name][:, :-{count}]"""
WARNING = """
At a latent token the model reads its last hidden state in place of an embedding. Plain `generate()`
does not do that: it silently ignores the thoughts, and its answers are wrong. `custom_generate`
below runs the code of this folder.
"""


def describe_checkpoint(
    folder: Path,
    name: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    epoch: int,
    step: int | None,
    stages: Sequence[int],
    more: str = "",
) -> None:
    """Write the card, the generation config and, where hidden states are fed back, the code.

    name: that the folder will have. step: optimizer steps done in a running epoch. stages: as of
    Curriculum.stage. more: what else the card shall say, in Markdown.
    """
    card = model_card(name, config, tokenizer, epoch, step, stages, more)
    (folder / "README.md").write_text(card, encoding="utf-8")
    generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.feeds_back:
        generation_config.update(
            latent_token_id=tokenizer.convert_tokens_to_ids(LATENT), allow_custom_entries=True
        )
        (folder / "custom_generate").mkdir()
        shutil.copyfile(custom_generate.__file__, folder / "custom_generate" / "generate.py")
    generation_config.save_pretrained(folder)  # over that of the base model, which may sample


def model_card(
    name: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    epoch: int,
    step: int | None,
    stages: Sequence[int],
    more: str = "",
) -> str:
    """The card's text."""
    curriculum = Curriculum.from_config(config)
    stage = curriculum.stage(epoch, stages)
    num_latents, num_skipped = curriculum.summary(stage)
    latents = markers = ""
    adapted = config.lora_r is not None
    if config.method is Method.COCONUT:
        times = f"{num_latents} times"
        if not config.pad_latent_to_max:
            times = f"{config.c_thought} times for each step that it takes, at most {times},"
        latents = f", `{START_LATENT}`, {times} `{LATENT}`, `{END_LATENT}`"
        markers = f'\nprompt += "{START_LATENT}" + {num_latents} * "{LATENT}" + "{END_LATENT}"'
    encoding = tokenizer(f"{QUESTION}\n").encodings[0]
    count = len(encoding) - end_of_text(encoding)
    steps = {"all": "", "0": "the steps of its reasoning, a line each, "}
    return CARD.format(
        front_matter=_front_matter(config),
        name=name,
        model_id=config.model_id,
        adapters=ADAPTERS if adapted else "",
        more_imports=", GenerationConfig" if adapted else "",
        own_generation=OWN_GENERATION if adapted else "",
        method=config.method.value,
        epochs=epoch if step is None else f"{epoch - 1}, and {step} optimizer steps of the next",
        stage=stage,
        num_latents=num_latents,
        latents=latents,
        steps=steps.get(num_skipped, "the remaining steps of its reasoning, a line each, "),
        warning=WARNING if config.feeds_back else "",
        marker=config.answer_marker,
        question=QUESTION,
        markers=markers,
        cut=CUT.format(count=count) if count else "",
        arguments=", custom_generate=folder, trust_remote_code=True" if config.feeds_back else "",
        more=more and f"\n{more}",
    )


def _front_matter(config: Config) -> str:
    """What the Hub files the model under; local files are nothing that it could link to."""
    of_hub = not config.from_scratch and not Path(config.model_id).exists()
    data = hub_name(config.train_path) if config.train_path else None
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=config.model_id if of_hub and HUB_NAME.fullmatch(config.model_id) else None,
        datasets=[data] if data else None,
        tags=[config.method.value],
    ).to_yaml()
