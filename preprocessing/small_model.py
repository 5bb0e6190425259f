"""A small Qwen3 to train from scratch on a task of ours: config and tokenizer, no weights.

    python preprocessing/small_model.py --output_dir data/quickstart_model
    python preprocessing/small_model.py --output_dir data/symbolic_model --task prosqa

writes a folder that AutoConfig and AutoTokenizer load (`from_scratch: True` in the YAML). The
vocabulary is all that the task can write with the same --max_number (stories) or --num_nodes
(symbolic ProsQA), whatever rows were drawn; question, steps and answer meet at token borders.
A folder that is there already is replaced if it holds nothing else.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

# The scripts also run by path: the repository is then not on the module path.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.arithmetic_stories import MAX_NUMBER, all_wordings
from preprocessing.common import count, positive, run_script
from preprocessing.prosqa import symbolic_vocabulary

EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
# A word takes the space before it, and the one after it if a number follows, so that a number is
# the same token wherever it stands. Line ends go with the sign before them: sequences are shorter.
TOKEN = r"\d+|<<|>>\n|>>|### |\?\n|\n| ?[A-Za-z]+(?: (?=\d))?|."
HEAD_DIM = 32
VOCABULARY_MULTIPLE = 32  # leaves room for the three latent markers: no table is ever resized


def build_tokenizer(tokens: list[str], positions: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of these tokens; it still has to learn how to split and to join."""
    names = [EOS, PAD, UNKNOWN, *tokens]
    vocabulary = {token: number for number, token in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )


def stories_tokenizer(max_number: int, positions: int) -> PreTrainedTokenizerFast:
    """The tokens of a text, joined, are the text again."""
    tokens = {token for text in all_wordings(max_number) for token in re.findall(TOKEN, text)}
    tokens |= {">>", "?", "\n"}  # they stand at a text's end too, as a caller may cut it anywhere
    tokenizer = build_tokenizer(sorted(tokens), positions)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return tokenizer


def prosqa_tokenizer(num_nodes: int, positions: int) -> PreTrainedTokenizerFast:
    """One token for a concept, wherever it stands: spaces are dropped, and stand between all
    tokens of a decoded text, around line ends too."""
    tokenizer = build_tokenizer([*symbolic_vocabulary(num_nodes), "\n", "###"], positions)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Split(" ", behavior="removed"),
        ]
    )
    return tokenizer


def build_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> Qwen3Config:
    if hidden_size % HEAD_DIM:
        raise ValueError(f"--hidden_size: {hidden_size} is no multiple of {HEAD_DIM}")
    room = len(tokenizer) + 3  # the latent markers
    heads = hidden_size // HEAD_DIM
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=-(-room // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def write_folder(output_dir: Path, *parts: Qwen3Config | PreTrainedTokenizerFast) -> None:
    """Save the parts into a folder that appears under its name only when it is complete.

    Raises ValueError where output_dir holds anything that this program did not write.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        new = writing / "new"
        for part in parts:
            part.save_pretrained(new)
        if output_dir.exists():
            strangers = {file.name for file in output_dir.iterdir()} - set(os.listdir(new))
            if strangers:
                raise ValueError(
                    f"output_dir: {output_dir} holds other files "
                    f"({', '.join(sorted(strangers))}); choose another folder"
                )
            output_dir.rename(writing / "old")
        new.rename(output_dir)
    finally:
        shutil.rmtree(writing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task", choices=("stories", "prosqa"), default="stories")
    parser.add_argument("--max_number", type=count, default=MAX_NUMBER, help="as for the stories")
    parser.add_argument(
        "--num_nodes", type=count, default=28, help="as for ProsQA (or its num_symbols)"
    )
    size = f"a multiple of {HEAD_DIM}"
    parser.add_argument("--hidden_size", type=positive, default=96, help=size)
    parser.add_argument("--num_layers", type=positive, default=2)
    parser.add_argument("--positions", type=positive, default=256, help="of a sequence, at most")
    args = parser.parse_args()
    if args.task == "stories":
        tokenizer = stories_tokenizer(args.max_number, args.positions)
    else:
        tokenizer = prosqa_tokenizer(args.num_nodes, args.positions)
    config = build_config(tokenizer, args.hidden_size, args.num_layers)
    write_folder(args.output_dir, config, tokenizer)
    print(f"{args.output_dir}: {len(tokenizer)} tokens, {config.num_hidden_layers} layers")


if __name__ == "__main__":
    run_script(main)
