"""A tiny Qwen3 to train from scratch on the arithmetic stories: config and tokenizer, no weights.

    python preprocessing/quickstart_model.py --output_dir data/quickstart_model

writes a folder that AutoConfig and AutoTokenizer load (`from_scratch: True` in the YAML). A token
is a word with the space before it, a number, or a sign: the tokens of a text, joined, are the text
again, and question, steps and answer meet at token borders. The vocabulary is all that
arithmetic_stories.py can write with the same --max_number, whatever rows were drawn. A folder that
is there already is replaced if it holds nothing else.
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
from preprocessing.arithmetic_stories import MAX_NUMBER, all_wordings  # noqa: E402
from preprocessing.common import count, run_script  # noqa: E402

EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
# A word takes the space before it, and the one after it if a number follows, so that a number is
# the same token wherever it stands. Line ends go with the sign before them: sequences are shorter.
TOKEN = r"\d+|<<|>>\n|>>|### |\?\n|\n| ?[A-Za-z]+(?: (?=\d))?|."
MAX_POSITIONS = 256
VOCABULARY_MULTIPLE = 32  # leaves room for the three latent markers: no table is ever resized


def build_tokenizer(max_number):
    found = {token for text in all_wordings(max_number) for token in re.findall(TOKEN, text)}
    found |= {">>", "?", "\n"}  # they stand at a text's end too, as a caller may cut it anywhere
    names = [EOS, PAD, UNKNOWN, *sorted(found)]
    vocabulary = {token: number for number, token in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False, model_max_length=MAX_POSITIONS,
    )


def build_config(tokenizer):
    room = len(tokenizer) + 3  # the latent markers
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=-(-room // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def write_folder(output_dir, *parts):
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
                raise ValueError(f"output_dir: {output_dir} holds other files "
                                 f"({', '.join(sorted(strangers))}); choose another folder")
            output_dir.rename(writing / "old")
        new.rename(output_dir)
    finally:
        shutil.rmtree(writing)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_number", type=count, default=MAX_NUMBER, help="as for the stories")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.max_number)
    config = build_config(tokenizer)
    write_folder(args.output_dir, config, tokenizer)
    print(f"{args.output_dir}: {len(tokenizer)} tokens, {config.num_hidden_layers} layers")


if __name__ == "__main__":
    run_script(main)
