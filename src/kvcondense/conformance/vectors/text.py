"""What a folder of test vectors says about itself, for who has nothing but the folder."""

README = """# Test vectors of kvcondense

DeepSeek-V4 compresses its KV cache: every r tokens become one row. These vectors check an implementation of that, in
any language. `NAME.json` says what is to be done, `NAME.safetensors` what must come out. `index.json` lists them with
the sha256 of both files and the class of bugs that each catches.

For each vector you do what the JSON says and write `OUT/NAME.safetensors` with

* `rows`: the cache rows at the slots `read`, [n, head_dim] BF16 or F32; of a quantised format U8 [n, bytes], the fields
  of the row one after the other; with `repeat` k, those of all k runs, [k n, ...]
* `untouched`: U8 [n, bytes of a row], the rows at the slots `untouched` after the last run, as they are stored
* `refused`: U8, one byte for each op `refuse`, in order: 1 if it was refused
* `pages` (of vectors with `exact`, where you can): U8 [num_pages, page bytes], the whole cache

Then `kvcondense vectors check DIR --against OUT` compares. Rows pass if |rows - expected| <= bound, element by element;
rows that `equal` names in pairs must be equal to the bit; untouched bytes are 0xA5 (fill the cache with it before).
`positions` are where the windows begin that these rows are of, `cos` and `sin` RoPE's angles there.

Inputs come from integers modulo 2^32. Value i of stream s with the vector's seed k:

    x = i * 0x9E3779B1 + k * 0x85EBCA77 + s * 0xC2B2AE3D + 0x165667B1
    x ^= x >> 15;  x *= 0x2C1B3C6D
    x ^= x >> 12;  x *= 0x297A2D39
    x ^= x >> 15
    value = (int(x >> 8) - 2^23) / 2^22          in fp32, exact

Stream 0 is the norm's weight: 1 + value / 4 for each channel. Stream 1 is the ape [r, N]: value / 2 * scale. Token t of
stream s is value * scale at i = t * 2N .. t * 2N + 2N - 1: N channels of kv, then N of scores (without ape). N is
head_dim, twice that if windows overlap. All of this in fp32, to which scale is rounded.

What each entry of the JSON means is told below, and with examples in the documentation of kvcondense.
"""
