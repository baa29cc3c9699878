"""What the catalogue and the layers of a run say: blueprints, why one does not fit, signals.

Stored in English as the library wrote it, and shown in the reader's language (``sentences.py``).
A test compares these with all blueprints, all answers why not, and all checks.
"""

from __future__ import annotations

from django.utils.translation import gettext_noop as _

BLUEPRINTS = (
    _("Sharded all-reduce"),
    _("Each rank sums one shard of the gradients, while all ranks gather the sums."),
    _("Many ranks share one bandwidth, and the gradient is large."),
    _("Self-attention branch, half-width keys and values"),
    _("Adds self-attention beside the layer in which two query heads share one key and value."),
    _("As attn_std, where its weights or memory are too much. Masks of the host are not seen."),
    _("Self-attention branch"),
    _("Adds multi-head self-attention beside the layer: positions exchange information."),
    _("Sequence model whose layers mix too little over time. Masks of the host are not seen."),
    _("Transformer block"),
    _(
        "Adds self-attention beside the layer and a GELU feed-forward branch behind the "
        "result, which is a transformer block."
    ),
    _("The loss is flat, and one branch alone, of either kind, did not help."),
    _("Expert capacity limit"),
    _(
        "Lets an expert serve 1.25 times its fair share of positions at most, reached by "
        "schedule; the others keep the layer's own output."
    ),
    _("One expert of a router gets most positions, and the time of a step depends on it."),
    _("Gradient clamp"),
    _("Scales this layer's gradient down whenever its L2 norm exceeds a bound."),
    _("One layer's gradients spike while those of other layers do not."),
    _("Single expert (GELU)"),
    _(
        "Adds one GELU expert beside the layer, four times as wide; every position uses it as "
        "much as its own gate says, or its share of the softmax of a router that is there."
    ),
    _("The layer has a feed-forward branch already, and the loss is still flat."),
    _("Single expert (SwiGLU)"),
    _(
        "Adds one gated expert beside the layer, four times as wide; every position uses it as "
        "much as its own gate says, or its share of the softmax of a router that is there."
    ),
    _("As expert_mlp_1d, where 1.5 times the weights are affordable and gating helps."),
    _("Keys and values in eight bits"),
    _("Rounds a decoder's keys and values to eight bits, so that its cache can be int8."),
    _("The model will generate long texts, and the cache of keys and values fills the memory."),
    _("LayerNorm becomes RMSNorm"),
    _("Fades a LayerNorm out and an RMSNorm with its gain in, over a number of steps."),
    _("The model should end with RMSNorm, which needs no mean and no bias; both run in between."),
    _("Expert load balancer"),
    _(
        "Keeps a running mean of each expert's use and shifts the router's choice, not its "
        "gates, towards experts that are used little."
    ),
    _("A router uses few of its experts, and no further loss is wanted."),
    _("Feed-forward branch (GELU)"),
    _("Adds a two-layer GELU network beside the layer, 2048/768 times as wide."),
    _("The layer is too small: the loss has flattened and gradients still agree."),
    _("Feed-forward branch (SwiGLU)"),
    _("Adds a gated network of three matrices beside the layer, 4096/768 times as wide."),
    _("As mlp_gelu_2048, where three times the weights are affordable and gating helps."),
    _("Balanced mixture of experts"),
    _(
        "Adds a top-2 router with its experts, one more gated expert that every position may "
        "use, a capacity limit and a balancer without a loss, as one graft."
    ),
    _("The layer is too small for what it sees, and experts are to be used evenly from the start."),
    _("Activation statistics"),
    _("Measures mean, spread and dead share of one layer's activations."),
    _("A layer looks unhealthy, and more should be measured before it is changed."),
    _("Channel gain (IA³)"),
    _("Multiplies each output channel by a learned gain that starts at one."),
    _("Channels carry very different weight, and almost no parameters may be added."),
    _("Low-rank update (LoRA)"),
    _("Adds a trainable low-rank matrix beside the layer's weight."),
    _("The layer's weight hardly moves, or is frozen, and a small correction may be enough."),
    _("Low-rank update with channel gains"),
    _("Adds a low-rank update and a gain for each channel side by side, at the cost of both."),
    _("A low-rank update helped, and the layer's channels differ in how much they matter."),
    _("Ring all-reduce"),
    _("Gradients are summed in chunks that travel around a ring of neighbouring ranks."),
    _("Links between neighbours are fast, and the gradient is large for the number of ranks."),
    _("Top-2 router with balancing loss"),
    _(
        "As router_top2, and a loss that grows when few experts do all the work is added in "
        "the backward pass."
    ),
    _("The layer is too small for what it sees, and a plain router would use few experts."),
    _("Top-2 router with experts"),
    _("Adds several GELU experts beside the layer; each position passes through two of them."),
    _("The layer is too small for what it sees, and most positions need only a part of it."),
    _("Wider hidden layer"),
    _("Adds units to the hidden layer between two layers, from one unit up."),
    _("The hidden layer is the bottleneck: the training loss is flat, and so is the held-out."),
)

PLACES = (
    _("parallel to %(first)s … %(last)s"),
    _("parallel to %(first)s … %(last)s, %(count)s units"),
)

REFUSALS = (
    _("%(place)s takes no graft: %(why)s"),
    _("%(first)s did not run in the traced forward pass"),
    _("it did not run in the traced forward pass"),
    _("%(first)s runs %(times)s times in a forward pass, so its calls differ"),
    _("a span needs an earlier layer; leave since= out for a graft beside one layer"),
    _("it is not known whether %(first)s runs before %(last)s; pass sample="),
    _("%(first)s runs after %(last)s, and a span reads an earlier input"),
    _(
        "activation checkpointing recomputes %(first)s and %(last)s apart, and the input of "
        "one is not there when the other is recomputed"
    ),
    _("%(first)s reads token numbers, not activations"),
    _("%(first)s is %(dtype)s on %(device)s, %(last)s is %(other_dtype)s on %(other_device)s"),
    _("the axes of its input and of the output do not correspond: %(one)s and %(other)s"),
    _("its input and the output have other batches or positions: %(one)s and %(other)s"),
    _("it acts on one layer and cannot span several; leave since= out"),
    _("it has fewer than %(count)s channels, and each head needs one"),
    _("it has one input channel, and normalising one channel gives zero"),
    _("it is attention itself; graft attention into a layer before or after it"),
    _("its input %(shape)s has no sequence axis to attend over"),
    _(
        "some parts of its model take time first and others the batch, and its input %(shape)s "
        "does not show which axis is time"
    ),
    _("the time axis of a recurrent layer is unknown"),
    _("its weights are frozen, so it has no gradient to clamp"),
    _("its keys and values are used in one fused call that keeps no cache"),
    _("no cache is known to keep the output of this %(kind)s"),
    _("it has one channel, and the RMSNorm of one channel is its sign"),
    _("it normalises over more than its last axis, and this RMSNorm over the last only"),
    _("its channels are unknown, because it did not run in the traced forward pass"),
    _("its kind is %(kind)s, and only a LayerNorm can become an RMSNorm"),
    _("the channel axis of a %(kind)s is unknown"),
    _("it has fewer than %(count)s channels, so a low-rank update would not be smaller"),
    _("its kind, %(kind)s, has no weight matrix that a low-rank update could add to"),
    _("its weight is split in %(count)s groups, and a low-rank update has no groups"),
    _("a hidden layer lies between two layers; name the first one with since="),
    _('its part "%(part)s" does not fit: %(why)s'),
    _("%(count)s of %(all)s blueprints fit %(place)s"),
    _("it sums the gradients of a whole model and needs at least %(count)s ranks"),
    _("a transposed convolution adds positions, which a point-wise branch cannot do"),
    _("it changes the positions, %(before)s to %(after)s, not only channels"),
    _("it ran without a batch axis in the traced forward pass"),
    _("its input is token numbers, not activations"),
    _("its padding is not symmetric zeros, or its geometry is unknown"),
    _("the meaning of the axes of a %(kind)s is unknown"),
    _("inputs with %(count)s axes are not supported"),
    _("its padding shifts or trims positions, and a point-wise branch does neither"),
    _("a container computes nothing itself; name one of the layers in it"),
    _("a %(kind)s contains other layers; name one of them"),
    _("a %(kind)s has no parameters; name a layer that has some"),
    _("it is compiled by TorchScript, which runs no hooks and takes no graft"),
    _("it is part of a PEFT adapter, whose merge reads its weights and would lose a graft"),
    _("it is prepared for quantisation, and torch's convert would lose a graft"),
    _("it is the whole model; name one of its layers"),
    _("its name is longer than %(count)s characters"),
    _("its parameters are on the meta device and hold no numbers"),
    _("its parameters have no shape before the first forward pass (a lazy module)"),
    _("its parent attention reads its weight without calling it, so a graft would never run"),
    _("a nested tensor"),
    _("a tensor of layout %(layout)s"),
)

SIGNALS = (
    _("norm of the layer's gradient"),
    _("norm of the layer's weights"),
    _("update norm / weight norm; about 1e-3 is healthy"),
    _("share of the layer's gradient that goes to its grafts"),
    _("mean of what the layer gives to the next one"),
    _("standard deviation of what the layer gives to the next one"),
    _("share of units with mean |h| <= 0.025 x the layer's mean"),
    _("share of activations within 1%% of the layer's extreme values"),
    _("stable rank of the weight / its largest possible rank"),
    _("|mean| / std of the gradient, from Adam's own buffers"),
    _("1 as usual, 0 far from it; by limits, own past, peers and findings"),
    _("largest |h| that the layer gives to the next one"),
    _("share of units that are exactly 0 in 99%% of the samples"),
    _("share of the gradient's entries that are exactly 0"),
)

CHECKS = (
    _("complete"),
    _("%(count)s on this layer"),
    _("< %(count)s in this run"),
    _("%(count)s steps"),
    _(">= %(count)s steps"),
    _("refused %(count)s s ago"),
    _("%(risk)s, %(count)s closed cases"),
    _("%(risk)s; from medium on %(count)s closed cases"),
    _("not measured: %(signals)s"),
    _("0 on probation, unless the finding is critical"),
    _("< %(count)s by rule for one kind of finding"),
    _("nothing that conflicts with %(other)s"),
)

RECIPES = (
    _("A byte-level transformer on the text of Python's own help topics."),
    _(
        "A small convolutional net on scikit-learn's handwritten digits. It is really too "
        "small: after some minutes there is something to adapt."
    ),
    _("optimizer steps in all"),
    _("of weights and batches"),
)

ALL = (*BLUEPRINTS, *PLACES, *REFUSALS, *SIGNALS, *CHECKS, *RECIPES)
