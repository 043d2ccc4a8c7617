"""Models whose circuit is known by construction: the exact truth that methods of circuit discovery are scored against.

`plant(seed, ...)` writes the weights of a GPT-2 by hand (softmax attention, LayerNorm, learned positions, ReLU MLPs),
as tracr does for programs (Lindner et al. 2023), but so that a method has to work for it: every node is active, the
residual stream is rotated at random, and all that is not the circuit is a distractor. Nothing is trained.

The task. A prompt is a line of words: `then Ann red of Bob blue so Ann at =`; the answer is a word, decided by one or
two *sources* in it. The corrupted prompt has another answer, which is the wrong one. Sources (`circuit`):

copy         a colour stands at a fixed position; a chain of heads carries it on (by position: values)
induction    `Ann red .. Bob blue .. Ann`: red. A previous-token head tells each colour its name, and an induction head
             at the second `Ann` looks for it (keys). In the corrupted prompt the names before the colours are exchanged
pointer      the same words; a duplicate-token head at the second `Ann` finds *where* the first is, a head carries the
             place on, and a mover looks there (queries). The corrupted prompt exchanges names, or the last is another
inhibition   `Ann .. Bob .. Ann`: Bob. As before, but the mover looks at the place that is not repeated

Two of them (`"induction+copy"`) are merged by an MLP: `gate="xor"` adds them modulo `n_values`, `"and"` takes the
smaller one (of two values: XOR, AND). Then `movers` heads carry the result to the last position, where the unembedding
reads it. Options: `lookup`: an MLP permutes the values before or after the movers; `hops`: longer chains; `width`:
each head of a source is so many heads that share the work; `negative`: heads that carry the result with a minus sign.

What makes it hard:
saturated   attention matches by 14 to 24 logits instead of 2.5 to 4, and MLPs clip: gradients of clean runs vanish
redundant   three movers vote, and an MLP takes the majority: removing one alone changes nothing (`Planted.redundant`)
loud        factor to what distractors write: a norm of 0.3 to 1.8 where they write most. The circuit's nodes write
            their variable with a norm of 0.8 to 2.5, and beside it something random with 0.4 to 1.4
fillers     words that matter not are "same" in both prompts, "fresh" in the corrupted one, or "constant" there: heads
            that read them differ between clean and corrupted, and in the last case see less variety in corrupted ones
Distractors look at the words that matter, at any others, or exactly where a head of the circuit looks (decoys); they
read words, each other's output, and the circuit's variables too. They write into directions that no node of the circuit
reads, so they act on it through the norm's scale alone; a large constant direction, as trained models have, keeps that
small: in `SUITE` no false node has a tenth of the effect of the weakest true one (that is not redundant).

The truth. `edges` are those through which something flows that differs between clean and corrupted and that reaches the
answer; `nodes` are their ends. `scaffold` are edges that the circuit needs and that carry the same in both prompts
(position codes, and words that stay): patching finds nothing there, ablation to zero or to a mean may, so a fair score
of edges leaves them out.
"""

from circuits.planted.planting import Planted as Planted
from circuits.planted.planting import plant as plant
from circuits.planted.suite import SUITE as SUITE
from circuits.planted.suite import variants as variants
