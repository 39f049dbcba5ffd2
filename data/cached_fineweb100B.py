"""Downloads FineWeb100B as GPT-2 tokens, ready for training:  python data/cached_fineweb100B.py [N]

As data/cached_fineweb10B.py, which has the code: the validation shard and N training shards (all 1030 unless told, 206
GB) of the Hugging Face dataset kjj0/fineweb100B-gpt2 come into data/fineweb100B/. Its validation shard is another than
FineWeb10B's: losses on the two do not compare.
"""

from cached_fineweb10B import Published, main
from shards import one_line_errors

FINEWEB_100B = Published("fineweb100B", 1030)

if __name__ == "__main__":
    with one_line_errors(FINEWEB_100B.program):
        main(published=FINEWEB_100B)
