"""Triton: attention for what vendors' kernels lack, and merges and sums of partial results (`merges`) on any GPU.

Attention takes any band, drops probabilities by position, and serves any head dims up to 256 and fp32. `kernel` offers
it to `choose_kernel`. Nothing is imported here: CPU ranks may have no Triton.

Forward and backward follow FlashAttention-2 (Dao, arXiv 2307.08691, algorithms 1 and 2): a program has a block of query
rows and walks over the keys that they see. The backward pass is two walks, over keys for dQ and over queries for dK and
dV, so nothing is added atomically and two runs agree bit for bit. Blocks that the band hides are not visited; those
that it cuts are masked.

Under a table of segments each program finds its segment and then sees nothing but its rows and keys: the loops are the
same. The number of programs is a bound that the host knows; those left over return at once.

What kernels pass on to each other comes in tuples: `sizes` (sq, sk), `band` (left, right) with None for no end, `drop`
as `keep.drop_arguments` makes it or None, `table` as `launch` makes it or None. A tensor [n, b, heads, d] comes with
its strides (n, b, heads), one head of it as a pointer and the stride of rows. Blocks have M rows, N keys, D columns of
queries and keys, of which d count, and DV of values, of which dv do.
"""
