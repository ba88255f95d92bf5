"""Words of tricky texts by the `tokenizers` package: `python tests/golden_tokens.py`.

Writes golden_tokens.json: for each split, the pieces (in bytes spelled as characters) into which
every text is cut before any pair is merged.
"""

import json
from pathlib import Path

TEXTS = [
    "Hello world, isn't it? I'LL say we're 12345 and 1e-7.",
    "  two  spaces\n\n\tand tabs \r\n lines \n",
    "naïve café, e\u0301 and é; Ελλάδα, Москва, 日本語テキスト, 한국어, العربية, हिन्दी, ไทย",
    "① Ⅷ ½ ٣٤ ५६ 𝟘𝟙 ²³",
    "👩‍👩‍👧‍👦 👍🏽 🇵🇹 ☃️",
    "a\x00b\x1cc\x1fd\x7f\x85e\u2028f\u3000g\u200bh\ufeff",
    "don't DON'T 'tis 'S ''s s's",
    "x=1;y==2&&z!=3 // comment\n    return x\n\n\n",
    "tabs\t\t\tend   ",
    "",
    " ",
    "\n \n",
    "ǅ ß ﬁ İ ı ſ K Å",
    "1234567890 12 3",
]


def main():
    from tokenizers import Tokenizer, models

    from minilora.files.tokenizer import Tokenizer as Ours
    from minilora.files.tokenizer import train_tokenizer
    from minilora.files.tokenizer_files import PRE_TOKENIZERS, tokenizer_json

    golden = {}
    for split in PRE_TOKENIZERS:
        made = train_tokenizer("", 257, split)
        ours = Ours(made.tokens, (), split, made.special, nfc=split == "qwen2")
        theirs = Tokenizer.from_str(tokenizer_json(ours).decode())
        assert isinstance(theirs.model, models.BPE)
        words = []
        for text in TEXTS:
            text = theirs.normalizer.normalize_str(text) if theirs.normalizer else text
            words.append([word for word, _ in theirs.pre_tokenizer.pre_tokenize_str(text)])
        golden[split] = words
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"texts": TEXTS, "words": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main()
