"""What the library writes for people in the trainer, and the server of what it did about it.

Findings, their advice, and remedies are stored in English as they were written; a page shows them
in the reader's language (``sentences.py``). A test compares these with all rules, watches and
remedies.
"""

from __future__ import annotations

from django.utils.translation import gettext_noop as _

RULES = (
    _(
        "the gradients are at most %(size)s in each step, and an update moves the weights by "
        "%(change)s of their size"
    ),
    _("the loss reads an output of %(shape)s in a view that mixes its axes"),
    _("classes that lie on one axis of the output"),
    _(
        "the softmax of an output of %(shape)s is over axis %(axis)s, and the loss chooses "
        "among the elements of axis %(other)s"
    ),
    _("a softmax over axis %(axis)s"),
    _(
        "Bring the axis of the classes to its place with permute or transpose: view and "
        "reshape keep the order of the elements and mix the axes. Let the softmax be over the "
        "axis of the classes: the second for cross_entropy and nll_loss."
    ),
    _(
        "the mask hides %(places)s places with %(tokens)s different tokens, and what is left "
        "to read is %(read)s token"
    ),
    _("a mask that hides the padding alone"),
    _(
        "Invert the mask: key_padding_mask of torch is True where a token is padding, and "
        "attention_mask of transformers is 1 where it is none."
    ),
    _("%(count)s batch norms are in evaluation mode and have seen no batch, %(layer)s first"),
    _("statistics of the data, or training mode"),
    _(
        "Leave the norm in training mode until it has seen the data, or load trained weights "
        "before it is frozen."
    ),
    _("it was first seen at %(layer)s"),
    _(
        "the outputs of a batch differ by %(spread)s of their size, at first by %(first)s, and an "
        "update was %(excess)s times as large as a sound one"
    ),
    _(
        "class %(number)s has %(rows)s of the sampled rows, and by the weights of the classes "
        "%(share)s of the loss"
    ),
    _("less than %(share)s of the loss for one class"),
    _(
        "Look at the weights of the classes: a rare class needs the larger one, such as rows "
        "/ (classes * rows of the class); pos_weight is rows of class 0 / rows of class 1."
    ),
    _("outputs that depend on the tokens so far"),
    _(
        "sequences that begin with the same token have outputs at that place that differ by "
        "%(distance)s of their size"
    ),
    _(
        "the losses at the first place add up to %(losses)s, and one token allows %(least)s "
        "at least"
    ),
    _(
        "Mask the attention so that each token sees itself and earlier ones alone, as "
        "is_causal=True does; take its softmax over the keys, the last axis; use no "
        "bidirectional layer, and batch_first=True for inputs that have the batch first."
    ),
    _("more than one unit in a hidden layer"),
    _(
        "%(one)s reads %(inputs)s numbers and passes one on, from which %(other)s computes "
        "%(outputs)s"
    ),
    _("Give the layer more units: at least as many as the model has classes."),
    _(
        "the loss began with %(first)s, is %(now)s and falls faster and faster, so nothing "
        "bounds it"
    ),
    _(
        "Look for a wrong sign or a term that is subtracted, such as a divergence (KL), which "
        "is added to the error of the reconstruction."
    ),
    _(
        "the rows of a batch differ by %(spread)s of the input's size, the root mean square "
        "of which is %(size)s"
    ),
    _("the model's input is exactly zero"),
    _("Look at what is loaded: a type, a scale or a mean that does not fit the data."),
    _("Subtract each feature's own mean, and divide by its own standard deviation."),
    _(
        "each update has %(count)s backward passes, and uses the gradient of the last one "
        "alone: zero_grad() has cleared the other %(others)s"
    ),
    _("the sum of all of them"),
    _("Call optimizer.zero_grad() after optimizer.step(), not before each backward()."),
    _("%(share)s of the sampled targets are class %(number)s"),
    _(
        "%(share)s of the sampled targets are class %(number)s, and the model answers it to "
        "every input"
    ),
    _("less than %(share)s of one class, or other answers"),
    _(
        "Judge by the recall of the rare classes, not by accuracy. Weight them in the loss, "
        "draw them more often, or ignore padding with ignore_index."
    ),
    _(
        "the first loss was %(whole)s, the cross-entropy of its outputs %(own)s; at step "
        "%(step)s that is %(now)s, and that of guessing %(chance)s"
    ),
    _("a cross-entropy that falls below that of guessing"),
    _(
        "Look at the other terms of the loss, such as a penalty on the weights, and give them "
        "a smaller factor: weight decay of 1e-4 is usual."
    ),
    _(
        "%(one)s and %(other)s read the same and return values of %(size)s in size, and "
        "%(behind)s behind them reads %(noise)s: noise, and nothing of the input"
    ),
    _("at least %(limit)s of one of them"),
    _(
        "Give the divergence (KL) a smaller factor, or raise that factor slowly. Sum the "
        "error of the reconstruction over its elements: a mean makes it small beside the "
        "divergence."
    ),
    _("the targets are the tokens of the model's input at the same places"),
    _("the targets are the tokens of the model's input two places later: shifted twice"),
    _("the next tokens, where a model predicts them"),
    _(
        "If the model predicts the next token: give it tokens[:, :-1], with tokens[:, 1:] as "
        "targets. Models that shift the labels by themselves, as those of transformers do, "
        "take labels that are equal to the input."
    ),
    _(
        "the loss is the probability of the right class without its minus sign, so that "
        "training lowers that probability"
    ),
    _("the loss is cross-entropy with a minus sign, so that training raises the error"),
    _("the loss is the probability of the right class, so that training lowers it"),
    _("Use cross_entropy of the raw outputs (logits), without a softmax and without a sign."),
    _(
        "the loss is the negative probability of the right class, as nll_loss of a softmax "
        "gives it: where that probability is small, it has next to no gradient"
    ),
    _("Use cross_entropy of the raw outputs (logits), or nll_loss of log_softmax."),
    _(
        "the first beta is %(beta)s, and the second is smaller: the direction of an update is a "
        "mean over %(count)s gradients"
    ),
    _("a first beta below the second; 0.9 and 0.999 are usual"),
    _("Give the smaller one first: betas=(0.9, 0.999)."),
    _(
        "%(layer)s has its first random values still, and the learning rate of its group is 0; the "
        "same is true of %(count)s matrices in all"
    ),
    _("a learning rate above zero"),
    _(
        "Give the group a learning rate, or load its trained weights. A scheduler multiplies the "
        "rate that the group began with, and 0 stays 0."
    ),
    _(
        "the norm of all gradients is %(norm)s in each step, and an update moves the weights by "
        "%(change)s of their size"
    ),
    _("updates of at least %(limit)s; about 0.001 is usual"),
    _("Raise the limit of the clipping, such as max_grad_norm; 1 is usual."),
    _("the gradients of all tensors are %(size)s and less, and eps is %(eps)s"),
    _("gradients well above eps"),
    _(
        "Look for a loss that is divided twice, such as by the batch and by the steps of an "
        "accumulation; otherwise multiply the loss, or lower eps."
    ),
    _("the softmax of an output of %(rows)s x %(columns)s is over its %(again)s rows"),
    _("a softmax over the %(columns)s columns"),
    _("Use dim=-1, or leave the softmax out where the loss is cross_entropy."),
    _("after %(step)s steps the outputs are %(size)s at most, and the error is %(error)s"),
    _("an error below %(limit)s times the largest output"),
    _(
        "Subtract the mean of the targets and divide by their standard deviation, and do the "
        "opposite with the answers; or set the last bias to the mean, and raise the learning rate."
    ),
    _(
        "the loss is the log-probability of the right class without its minus sign, so that "
        "training lowers that probability"
    ),
    _("Use nll_loss, or put a minus sign before the loss."),
    _("all %(count)s trainable tensors have no gradient when the optimizer steps"),
    _("all %(count)s trainable tensors have a gradient of zero when the optimizer steps"),
    _("a gradient above zero"),
    _(
        "Call zero_grad() before backward() and not after it; check that backward() is called, and "
        "that nothing detaches the loss from the model. In float16 small gradients become zero: "
        "scale the loss by a GradScaler."
    ),
    _("the weight decay takes %(share)s of the weights in each update"),
    _("below %(limit)s; 0.01%% is usual"),
    _("the weight decay adds %(times)s times as much to the gradient as the loss does"),
    _("below %(limit)s times"),
    _("Lower the weight decay: 0.01 is usual for AdamW, 1e-4 for SGD and Adam."),
    _("the momentum is %(momentum)s, so a gradient acts on in %(count)s updates"),
    _("the momentum is %(momentum)s, so a gradient acts on in all updates"),
    _("below %(limit)s; 0.9 is usual"),
    _("Use a momentum of 0.9, with the same learning rate or a lower one."),
    _("%(layer)s sets %(share)s of its values to zero"),
    _("less than %(limit)s; 50%% and less is usual"),
    _("Lower the probability: p is the share that is set to zero, not the share that stays."),
    _("%(layer)s computes the statistics of a channel from %(count)s values"),
    _("more than %(limit)s values"),
    _("Use larger batches, or a norm that needs no batch, such as GroupNorm or LayerNorm."),
    _(
        "the momentum of %(layer)s is %(momentum)s, so the statistics that evaluation uses never "
        "change"
    ),
    _(
        "the momentum of %(layer)s is %(momentum)s, so the statistics that evaluation uses are "
        "those of the newest batch"
    ),
    _("above 0 and below %(limit)s; 0.1 is usual"),
    _(
        "Use 0.1, or None for a plain mean: in PyTorch it is the weight of the new batch, in "
        "other libraries that of the old ones."
    ),
    _(
        "%(count)s of %(all)s parameters are frozen, and all their matrices have the random "
        "values of new layers"
    ),
    _(
        "%(count)s of %(all)s parameters are frozen, and all their biases and norms have the "
        "values of new layers"
    ),
    _("frozen weights that were trained"),
    _(
        "Load the trained weights, and check that load_state_dict reports no missing keys; "
        "otherwise set requires_grad=True."
    ),
    _("the outputs of a batch differ by %(share)s of their size, and the inputs differ"),
    _(
        "Look for a mean or a softmax over the batch instead of the features, and for a loss that "
        "is lowest where all outputs are equal."
    ),
    _("%(count)s of %(all)s observed batches hold one class each, %(classes)s different ones"),
    _("batches with several classes"),
    _("Shuffle the data: DataLoader(..., shuffle=True)."),
    _("the root mean square of the model's input is %(size)s"),
    _("below %(limit)s"),
    _("the model's input has values that are NaN or infinite"),
    _("finite inputs"),
    _("Remove or replace the values that are NaN or infinite."),
    _("Scale each feature to a mean of 0 and a standard deviation of 1, or to 0..1."),
    _(
        "%(count)s of %(all)s updates started from the gradient of the update before, so their "
        "batches were applied twice"
    ),
    _("each update starts from a gradient of zero"),
    _(
        "Call optimizer.step() and optimizer.zero_grad() together, after the same number of "
        "backward passes."
    ),
    _(
        "the rows of a batch differ by %(before)s of their size at the input, and by %(after)s "
        "at %(layer)s"
    ),
    _("at least %(limit)s at every layer"),
    _(
        "the standard deviation of what enters %(layer)s is %(size)s, and that of the input is "
        "%(input)s"
    ),
    _("at least %(limit)s, and %(share)s of the input's"),
    _("at most %(limit)s, and %(share)s times the input's"),
    _("the median of std(weights) x sqrt(inputs) is %(median)s, in %(layer)s %(size)s"),
    _("from %(low)s to %(high)s"),
    _("the first loss is %(loss)s, and that of guessing is %(guess)s"),
    _("at most %(times)s times that of guessing"),
    _("Initialise so that each layer keeps the scale of its input, such as Kaiming or Xavier."),
    _(
        "in %(steps)s steps the training loss fell by %(fall)s to %(level)s, and no held-out "
        "loss is measured; between %(first)s and %(last)s are only %(units)s units"
    ),
    _(
        "in %(steps)s steps the training loss rose by %(fall)s to %(level)s, and no held-out "
        "loss is measured; between %(first)s and %(last)s are only %(units)s units"
    ),
    _(
        "in %(steps)s steps the training loss fell by %(fall)s to %(level)s, and the held-out "
        "loss fell by %(held_fall)s to %(held)s; between %(first)s and %(last)s are only "
        "%(units)s units"
    ),
    _(
        "in %(steps)s steps the training loss fell by %(fall)s to %(level)s, and the held-out "
        "loss rose by %(held_fall)s to %(held)s; between %(first)s and %(last)s are only "
        "%(units)s units"
    ),
    _(
        "in %(steps)s steps the training loss rose by %(fall)s to %(level)s, and the held-out "
        "loss fell by %(held_fall)s to %(held)s; between %(first)s and %(last)s are only "
        "%(units)s units"
    ),
    _(
        "in %(steps)s steps the training loss rose by %(fall)s to %(level)s, and the held-out "
        "loss rose by %(held_fall)s to %(held)s; between %(first)s and %(last)s are only "
        "%(units)s units"
    ),
    _("a fall above %(limit)s, or a wider hidden layer"),
    _('Add hidden units: session.graft(layer, "widen_hidden", since=...).'),
    _(
        "%(count)s of %(all)s modules of %(group)s had no gradient in %(readings)s readings: "
        "%(names)s"
    ),
    _("a gradient in each of them"),
    _("Add a loss that balances the router, or noise to its choice."),
    _("%(count)s of %(all)s ranks hold other weights than rank 0, the first is rank %(first)s"),
    _("equal weights on all ranks"),
    _(
        "Make the first weights and all branches of forward() the same on each rank, and "
        "average every gradient."
    ),
    _(
        "%(share)s of the units of %(layer)s had a gradient of exactly zero in %(readings)s "
        "readings in a row"
    ),
    _("less than %(limit)s"),
    _(
        "If it was sudden, return to a checkpoint before it with a lower learning rate; "
        "otherwise give the dead units a new start, or use LeakyReLU, GELU or normalisation."
    ),
    _(
        "%(count)s forward passes in training mode had no update, in %(steps)s steps; batch "
        "statistics took their data in"
    ),
    _("model.eval() in an evaluation"),
    _("evaluate() ran modules in training mode, in %(count)s calls of them"),
    _("Call model.eval() before an evaluation, and model.train() after it."),
    _("the gradient norm is %(norm)s in %(first)s and %(other)s in %(last)s, a ratio of %(ratio)s"),
    _("a ratio of at most %(limit)s"),
    _("a ratio of at least %(limit)s"),
    _("the gradient norm is %(norm)s, and the loss a mean of %(kind)s"),
    _("a norm of at most %(limit)s"),
    _("the loss grew from %(before)s to %(now)s, and the gradient from %(first)s to %(largest)s"),
    _("at most %(limit)s times the first loss"),
    _("Clip the gradient, lower the learning rate, and start with smaller weights."),
    _(
        "Start with larger weights, use ReLU-like activations, normalisation or residual "
        "connections; fewer layers may do as well."
    ),
    _(
        "the loss fell from %(first)s to %(best)s at step %(step)s, and has been %(level)s for "
        "%(steps)s steps"
    ),
    _("less than %(limit)s of the gain given back"),
    _("the inputs had a size of %(before)s and have %(after)s now"),
    _(
        "The inputs are larger or smaller than before: if that is not meant, look at what the "
        "script does to them."
    ),
    _(
        "Return to a checkpoint from before the loss rose, with a lower learning rate; if the "
        "data or the loss changed there, that is the cause."
    ),
    _("%(count)s of %(all)s parameters are frozen; no weight matrix learns"),
    _("a weight matrix that learns"),
    _(
        "%(tensor)s is frozen, and all its elements are 0; the same is true of %(count)s "
        "matrices in all"
    ),
    _("frozen weights that do something"),
    _("Set requires_grad=True on the matrices that should learn."),
    _(
        "zero_grad() is missing: the gradient grew by the last gradient in each of %(count)s "
        "updates"
    ),
    _("zero_grad() is missing: the gradient grew by the last gradient in each of %(count)s update"),
    _("Call optimizer.zero_grad() once for each optimizer.step(), before backward()."),
    _("the loss is a sum over %(parts)s"),
    _("%(count)s rows"),
    _("%(count)s squares"),
    _("the %(count)s batches of an update"),
    _(
        "Divide the loss of each batch by the number of batches of an update, or divide the "
        "learning rate by it."
    ),
    _("the loss is a sum over %(parts)s, and its first update moves the weights by %(change)s"),
    _("a mean over the batch"),
    _('Use reduction="mean", or divide the learning rate by the size of the batch.'),
    _("the loss was above %(limit)s %(times)s times in a row, now %(loss)s"),
    _(
        "Look at the learning rate and at the batches before the jump; if the loss does not "
        "come back, return to a checkpoint before it."
    ),
    _(
        "the training loss fell from %(before)s to %(now)s; the held-out loss was %(first)s at "
        "step %(step)s, at best %(best)s, and is %(held)s"
    ),
    _("a held-out loss that falls with the training loss"),
    _("Check that labels and inputs belong together, in both sets: they may be shuffled."),
    _("the %(count)s linear layers from %(first)s to %(last)s have nothing between them"),
    _("an activation between two linear layers"),
    _("Put an activation such as ReLU or GELU between the layers."),
    _("the loss became %(loss)s"),
    _("the weights of %(count)s layers are not finite"),
    _("the gradients of %(count)s layers are not finite"),
    _("the learning rate has been 0 since the start, for %(count)s steps"),
    _("a learning rate above 0"),
    _(
        "Look at the schedule: what it multiplies the rate by is 0, as a whole-number division or "
        "a warm-up that counts epochs gives. In Lightning, interval decides what it counts."
    ),
    _("weights and gradients are finite"),
    _("the weights are finite, and all gradients are zero"),
    _(
        "No target of the batch counts, and a mean over none is NaN: look at the labels that the "
        "loss gets. cross_entropy, and so transformers, leaves out those that are -100."
    ),
    _("the model's input was not finite"),
    _("finite"),
    _("The data has values that are NaN or infinite: remove or replace them."),
    _("The weights are intact: skip this batch, and look at its data and the loss."),
    _("Return to the last checkpoint with finite weights, with a lower learning rate."),
    _("Give it to the optimizer, or set requires_grad=False."),
    _(
        "%(share)s of the weights changed in %(count)s updates at a learning rate of %(rate)s, "
        "although gradients are above zero"
    ),
    _("weights that change"),
    _(
        "Check that the optimizer was made from the parameters of this model, after .to() and "
        "after loading it, and that a step is not smaller than the rounding of the weights' "
        "dtype."
    ),
    _("the loss swings by %(size)s around %(level)s, at updates of %(update)s of the weights"),
    _("swings below %(limit)s of the level"),
    _("Lower the learning rate, or make the batches larger."),
    _(
        "the held-out loss is %(now)s; its best was %(best)s at step %(step)s; the training "
        "loss fell from %(before)s to %(training)s"
    ),
    _("at most %(limit)s above the best"),
    _("Keep the weights of the best evaluation; use weight decay, more data, or stop here."),
    _(
        "the loss has been %(level)s for %(steps)s steps; its trend is %(trend)s with an error "
        "of %(error)s"
    ),
    _("the schedule has lowered the learning rate"),
    _("a fall of %(limit)s"),
    _(
        "Try another learning rate first; if that changes nothing, the model may be too small "
        "where it is narrowest."
    ),
    _(
        "the learning rate rose from %(before)s to %(after)s between steps %(from)s and "
        "%(until)s, and the loss from %(level)s to %(loss)s"
    ),
    _("a loss of at most %(limit)s"),
    _("Look at the schedule: return to a state before the jump, with the rate of before."),
    _("the learning rate was %(rate)s, and since step %(step)s it is at most %(limit)s"),
    _("a rate above %(limit)s of the highest while the run goes on"),
    _(
        "Look at the schedule: scheduler.step() may be called once a batch where it counts "
        "epochs, or the number of steps that it was given is too small."
    ),
    _(
        "%(count)s matrices start with exactly the elements of another; %(first)s with those of"
        " %(twin)s"
    ),
    _("layers that differ"),
    _(
        "%(share)s of the units of %(layer)s start with the weights of the unit before; the "
        "same is true of %(count)s layers in all"
    ),
    _("units that differ"),
    _("Initialise each layer with new random numbers; do not set the seed again."),
    _(
        "%(share)s of what enters %(layer)s is saturated; the same is true of %(count)s of "
        "%(all)s layers in all"
    ),
    _("Start with smaller weights and scaled inputs; if it came later, lower the rate."),
    _("after %(steps)s steps the loss is %(loss)s, and that of guessing %(guess)s"),
    _("after %(steps)s steps the outputs of a batch differ by %(share)s of their size"),
    _("after %(steps)s steps the loss is %(share)s of the first"),
    _("below %(limit)s of it"),
    _("at least %(limit)s"),
    _("a fall of more than %(limit)s"),
    _("Try a higher learning rate, or another optimizer; check that the labels fit the inputs."),
    _(
        "The loss is higher than that of guessing: lower the learning rate or the momentum, and "
        "check that the labels fit the inputs."
    ),
    _("%(place)s is the same object as %(other)s; %(count)s such places"),
    _("one layer for each place"),
    _("Make a new layer for each place: [Layer() for _ in range(n)], not [Layer()] * n."),
    _(
        "%(count)s modules were in evaluation mode in the last %(updates)s updates, and in "
        "training mode before"
    ),
    _("%(count)s modules were in evaluation mode in the last %(updates)s updates, since the start"),
    _("model.train() while the weights are updated"),
    _("Call model.train() before each epoch, also after an evaluation."),
    _(
        "no gradient reaches the first %(count)s trainable layers, up to %(layer)s; %(others)s "
        "layers have one"
    ),
    _("a gradient in every trainable layer"),
    _(
        "Look for detach(), no_grad(), .data or a conversion to numpy between this layer and "
        "the loss, and check that the layer is called."
    ),
    _(
        "the loss has been %(level)s for %(steps)s steps, that of guessing is %(guess)s, and an"
        " update moves the weights by %(change)s"
    ),
    _("below %(limit)s until something is learned"),
    _(
        "the loss has been %(level)s for %(steps)s steps, it began with %(first)s, and an update"
        " was %(times)s times as large as a sound one"
    ),
    _("at most %(times)s times as large"),
    _("the median update is %(ratio)s of its weight at step %(step)s"),
    _("below %(limit)s; about %(usual)s is usual"),
    _("the update of step %(step)s moved the weights by %(change)s in the median"),
    _("%(share)s of their size"),
    _("%(times)s times their size"),
    _("layer %(name)s"),
    _("Lower the learning rate, by a factor of ten first."),
    _(
        "up to step %(step)s the median update is at most %(ratio)s of its weight, and the loss"
        " is %(share)s of the first"
    ),
    _("at least %(limit)s; about %(usual)s is usual"),
    _("Raise the learning rate, by a factor of ten first."),
    _(
        "The learning rate still rises: shorten its warm-up, such as warmup_steps of a "
        "transformers Trainer, or raise the rate that it rises to."
    ),
    _(
        "The updates are the weight decay alone, and a higher learning rate would raise it too. "
        "Look for what makes the gradients so small: a clipping to a tiny norm, or a loss that is "
        "divided twice."
    ),
    _(
        "Leave lr at 1: the optimizer estimates the rate, and its estimate has not grown. Give it "
        "a larger d0 or d_coef, and no warm-up of your own."
    ),
    _("nll_loss is applied to outputs that are no log-probabilities, so it falls without end"),
    _("End the model with log_softmax, or use cross_entropy."),
    _("%(loss)s has targets from %(low)s to %(high)s"),
    _("Use targets 0 and 1, or cross_entropy for more than two classes."),
    _(
        "every output is compared with the mean of all targets: outputs and targets have shapes"
        " that broadcast against one another"
    ),
    _("Give outputs and targets the same shape, with squeeze(-1) or unsqueeze(-1)."),
    _("mse_loss has whole numbers from 0 to %(high)s as targets, which look like class numbers"),
    _("For classes use cross_entropy with one output for each; for counts poisson_nll_loss."),
    _(
        "the loss has been %(loss)s in each step, and its gradient exactly zero: it does not "
        "depend on the outputs"
    ),
    _("cross_entropy of a single output is always 0; use binary_cross_entropy_with_logits."),
    _("the loss is a squared error with a minus sign, so that training raises the error"),
    _("Remove the minus sign before the loss."),
    _("the loss is %(loss)s, and %(kind)s is never below zero"),
    _("Look for a wrong sign, or for a term that is subtracted."),
    _("a loss that fits outputs and targets"),
    _("Use the loss that fits the outputs: cross_entropy for classes, mse_loss for numbers."),
    _("a softmax is applied to the model's output, and cross-entropy applies another one"),
    _("Give cross-entropy the raw outputs (logits): remove the softmax before it."),
    _("the model ends with %(end)s, and the loss applies a sigmoid to it"),
    _("Remove the %(end)s, or use binary_cross_entropy after a sigmoid."),
    _("the model ends with a softmax, and cross-entropy applies another one"),
    _("Remove the softmax: cross-entropy takes the raw outputs (logits)."),
    _("the model ends with %(end)s, and cross-entropy applies a softmax to it"),
    _("Remove the %(end)s at the end: cross-entropy takes raw outputs (logits)."),
    _(
        "the model ends with %(end)s, which stays within %(low)s and %(high)s; the targets are "
        "from %(lowest)s to %(highest)s"
    ),
    _(
        "the model ends with %(end)s, which is never below %(low)s; the targets are from "
        "%(lowest)s to %(highest)s"
    ),
    _("Remove the %(end)s at the end of the model, or scale the targets."),
    _("an output that fits the loss"),
    _("a softmax over one output is 1 for every input"),
    _("Use a sigmoid."),
    _("Remove the activation at the end of the model."),
    _("%(first)s and %(second)s are zero, and so are their gradients; %(count)s such pairs"),
    _("a factor that is not zero"),
    _("Start one of the two factors with random numbers."),
)

WATCHES = (
    _("trainable, but in no optimizer: it will never change"),
    _(
        "%(count)s tensors, the first is %(first)s, have a gradient, but are in a plain list or "
        "dict, where parameters() misses them: no optimizer trains them"
    ),
    _(
        "keep them in nn.ModuleList, nn.ModuleDict or nn.ParameterList, and make the optimizer "
        "afterwards; set requires_grad=False where they must not learn"
    ),
    _(
        "%(count)s tensors, the first is %(first)s, are in %(kind)s, an optimizer that Esper "
        "was not given: it does not know how they train"
    ),
    _("attach all optimizers of the model: esper.attach(model, [first, second])"),
    _(
        "%(count)s tensors, the first is %(first)s, change, but are in no optimizer that Esper "
        "was given: it does not know how they train"
    ),
    _("nothing, where the optimizer has its own copies of them; otherwise attach what trains them"),
    _("frozen, after an optimizer has trained it"),
    _("set requires_grad=True, or take it out of the optimizer"),
    _("held %(times)s times: it is updated more than once a step"),
    _("keep it in one parameter group of one optimizer"),
    _("%(count)s tensors held by an optimizer are not in the model"),
    _(
        "rebuild the optimizer if a layer was replaced; tensors of a loss or of another model "
        "are no problem, and are not watched"
    ),
    _("%(count)s entries of optimizer state belong to no group"),
    _("remove them from optimizer.state; they only use memory"),
    _("to choose class and rate yourself, attach another optimizer too"),
    _(
        "the script changes the gradients of its optimizer's tensors before the step, in a way "
        "that is not repeated on the graft's"
    ),
    _("change the gradients of model.parameters(), which includes the graft's"),
    _("the graft learns no more: %(kind)s, its optimizer, failed: %(error)s"),
    _("take the graft out"),
    _("the optimizers hold each trainable tensor of the model once, and no other tensor"),
    _("%(count)s tensors, the first is %(first)s: %(what)s"),
    _("has a gradient, but has not changed in %(steps)s steps of its optimizer"),
    _("the steps do not reach it, or are too small for its %(dtype)s numbers"),
    _("%(kind)s made no step in %(steps)s steps of the session"),
    _("call optimizer.step() before session.step(loss)"),
    _(
        "the graft learns nothing: no gradient has reached it in %(steps)s steps, because the "
        "loss does not depend on %(what)s"
    ),
    _("its layer's output"),
    _("the outputs of all steps, which it changes"),
    _("it does not change the last state (h_n)"),
    _("remove it, and graft into a layer whose output the model uses"),
    _("has not changed in %(steps)s steps and has no gradient: the loss does not depend on it"),
    _("check that its layer is called; freeze it if this is intended"),
    _(
        "a copy of the model lacks this layer's grafts, or has other grafts; a running average "
        "pairs tensors by position and would mix different tensors"
    ),
    _("pass it to attach as copies=, or call esper.grafting.let_follow(model, [copy])"),
    _("no parameter had a gradient in %(count)s health frames"),
    _("gradients of the layers that train"),
    _(
        "Attach the optimizer that makes the steps, or call session.step() while the gradients "
        "exist. Where torch.func computes the loss from other tensors than the model's "
        "parameters, these get no gradient, and are not measured."
    ),
    _(
        "the loaded state was saved without %(blueprint)s, grafted at step %(step)s, so this "
        "graft was taken out"
    ),
    _(
        "the loaded state was saved with %(blueprint)s, so this graft was built again, and "
        "counts as kept"
    ),
    _("the model computes what the state's model computed"),
    _("Nothing to do: the model is the one that was saved."),
    _("a snapshot takes %(size)s GiB, so only the last %(count)s changes can be undone hard"),
    _(
        "a snapshot takes %(size)s GiB, so a hard undo is not possible, and a rollback keeps "
        "what the model has learned"
    ),
    _("on disk: %(error)s"),
    _("%(size)s GiB for all snapshots"),
    _(
        "Give snapshots more memory: esper.attach(snapshot_memory=…) in GiB, "
        "ESPER_SNAPSHOT_MEMORY_GIB, or a folder for them: snapshot_folder=…."
    ),
    _("a running average of the model was found, and gets its grafts too"),
    _("an average has the model's tensors, in the model's order"),
    _("Nothing to do. Pass averages to esper.attach as copies= to name them yourself."),
    _("a hard undo restores the state before the change, and keeps what the script has set"),
    _("Check these settings; an undo takes back the change and the training since."),
    _("the grafts were left out of a call of the layer, because one failed: %(error)s"),
    _("a graft runs on every input of its layer"),
    _("Take the graft out with session.undo, or give the layer inputs as in training."),
    _("a step of the session came without a loss"),
    _("a loss at each step"),
    _(
        "The guard cannot see the loss diverge, and no graft can be judged by it: pass it to "
        "session.step(loss); in a transformers Trainer whose training_step does not call "
        "super().training_step, call the callback's observe(loss); with Lightning, return it from "
        "training_step."
    ),
    _("Esper's %(part)s failed: %(error)s"),
    _("no failures"),
    _("%(unmeasured)s It is switched off for this layer; training goes on."),
    _("%(unmeasured)s It is switched off for this run; training goes on."),
    _("the attached optimizer trains the model: its steps are what is measured"),
    _("Attach again with the new optimizer: session.close(), then esper.attach(model, optimizer)."),
    _(
        "%(names)s made no step since step %(step)s of the session, and %(kind)s, which Esper "
        "was not given, trains the model"
    ),
    _("torch.compile gave up on a part of the run after too many recompilations"),
    _("it runs eagerly from now on"),
    _(
        "TORCH_LOGS=recompiles tells what changed. Where it is the layers' shapes, raise "
        "torch._dynamo.config.recompile_limit. Where it is a graft in one of many blocks that "
        "are compiled one by one, raise it by one for each different block."
    ),
)

REMEDIES = (
    _("keep the learning rate"),
    _("halve the learning rate"),
    _("double the learning rate"),
    _("divide the learning rate by %(factor)s"),
    _("multiply the learning rate by %(factor)s"),
    _("Train what no optimizer holds"),
    _(
        "Trains these tensors beside the script's optimizer, in one of the same class that "
        "steps with it, at the rate of its first group. The script's optimizer stays as it is."
    ),
    _("A trainable tensor gets a gradient, is in no parameter group, and has not moved."),
    _("Keep a checkpoint now"),
    _(
        "Keeps the present weights, buffers and optimizer state among the good states that the "
        "run can be rewound to, and calls the checkpoint function that was given to attach. A "
        "state of a run with an open serious finding is saved by that function only."
    ),
    _("A person wants to be able to come back to the present state."),
    _("Clip gradients per tensor"),
    _("Clip each gradient at %(factor)s times its recent norm"),
    _(
        "Scales the gradient of each tensor down where its norm exceeds a multiple of the "
        "running mean of its own clipped norms. Below that limit a gradient stays as it is. "
        "After 100 updates without a gradient of four times the usual norm the clip of a tensor"
        " is lifted, until there is one again."
    ),
    _("Single gradients explode or spike while the rest of the run is sound."),
    _("Evaluate now"),
    _(
        "Calls the evaluate function that was given to attach, once, at the next step boundary."
        " The held-out loss is shown with the result and in the run's curves."
    ),
    _("A person wants to know the held-out loss before the next evaluation is due."),
    _("Set the learning rate"),
    _("Set the learning rate to %(value)s"),
    _(
        "Uses one learning rate inside each optimizer step until it is taken back, whatever "
        "schedulers do meanwhile. Where parameter groups have different rates, the highest "
        "becomes the value, and the others keep their ratio to it. The optimizer's groups and "
        "the schedulers keep their own values. A change by a factor that comes later multiplies"
        " it."
    ),
    _("A person knows which rate the run should have."),
    _("Match the learning rate to the updates"),
    _("Change the learning rate until an update is %(share)s of the weights"),
    _(
        "Measures how far the updates move the weight matrices, and changes the learning rate "
        "inside each optimizer step until the median is the wished share: it rises in stages, "
        "and falls at once where updates grow, and does not rise far again after that. After "
        "200 updates the factor stays."
    ),
    _("The learning rate of SGD is far too low, or was chosen anew and has to fit."),
    _("Give dead units a new start"),
    _(
        "Gives the units of a layer that do not fire for the batch new incoming weights, "
        "outgoing weights of zero and no moments, so that the output changes only by what they "
        "still gave. In force, it does so again with units that fall silent, each judged by its"
        " own usual silences. On several ranks it acts once."
    ),
    _("Many units of a layer do not fire for any input."),
    _("Repair the scale of the weights"),
    _(
        "Scales the weights of each layer, in the order in which they run, so that the root "
        "mean square of its output on one batch is 1. Where most of an output is the same for "
        "all inputs, the biases are set to zero, or, where that is not enough, so that they "
        "take it out. The last layer is only scaled down, and no layer far beyond those before "
        "it. A run of at most 50 steps first goes back to its first weights, where they are "
        "kept. Layers whose units are equal get new random weights before they are scaled. The "
        "recurrent weights of a plain RNN whose output grows along the sequence are made "
        "smaller. Where the inputs of the first layer are large, its updates get smaller too, as "
        "if the inputs were scaled, each feature by itself where they differ far in size; where "
        "those of a later layer hardly differ, as behind a sigmoid, its updates get larger. A "
        "later layer learns as if the mean of its inputs were taken out of them."
    ),
    _("The initialisation makes activations vanish, explode or saturate before training."),
    _("Restore the best held-out weights"),
    _("Restores the weights, buffers and optimizer state that had the lowest held-out loss."),
    _("The held-out loss has risen for long while the training loss fell."),
    _("Rewind to a good state"),
    _("Rewind to the youngest good state and %(rate)s"),
    _("Rewind to where the first remedy was given and %(rate)s"),
    _("Rewind to step %(step)s and %(rate)s"),
    _(
        "Restores the weights, buffers and optimizer state of an earlier good step, multiplies "
        "the learning rate by a factor, and leaves out updates that are not finite. Schedulers "
        "and data go on, so the batches in between are skipped. Where the loss stays high with "
        "the earlier weights, the data or the targets have changed, and the rewind is undone."
    ),
    _("The loss has diverged, or weights are not finite."),
    _("Change the learning rate"),
    _(
        "Multiplies the learning rate inside each optimizer step. The optimizer's groups and "
        "the schedulers keep their own values."
    ),
    _("The loss oscillates or diverges, or the updates are far too large or too small."),
    _("Skip updates that are not finite"),
    _(
        "Leaves out an optimizer step where a gradient is NaN or infinite, as a gradient scaler"
        " does. Weights, moments and counters stay as they are in such a step."
    ),
    _("Single batches give gradients that are not finite."),
    _("Stop the training"),
    _(
        "Asks the loop to stop, and restores the weights, buffers and optimizer state that had "
        "the lowest held-out loss. Lightning and the transformers Trainer stop after the step. "
        "A loop of its own goes on until it reads session.should_stop; Esper ends no loop by "
        "itself."
    ),
    _("The held-out loss has risen for long, and a higher weight decay did not help."),
    _("Train frozen parameters"),
    _(
        "Sets requires_grad on the frozen parameters of a layer, or of the model. Those that no"
        " optimizer holds are trained beside the script's, in one of the same class that steps "
        "with it; the script's optimizer stays as it is."
    ),
    _("All weight matrices of the model, or of a layer, are frozen, and should learn."),
    _("Change the weight decay"),
    _("Set the weight decay to %(value)s"),
    _(
        "Uses another weight decay inside each optimizer step, in the groups that have one. The"
        " optimizer's groups keep their own values."
    ),
    _("The training loss falls while the held-out loss rises."),
)

DECISIONS = (
    _("%(count)s units between %(first)s and %(last)s"),
    _("the share of its possible rank that the layer's weight uses"),
    _("the share of the run's gradient at this layer"),
    _("how narrow the layer is compared with the widest one"),
    _("the share of its possible rank that the layer's weight uses: unknown"),
    _("the share of the run's gradient at this layer: unknown"),
    _("how narrow the layer is compared with the widest one: unknown"),
    _("%(helped)s of %(cases)s cases helped; the rate that a usual training has"),
    _("%(count)s cases of %(what)s"),
    _("cases at %(kind)s layers"),
    _("cases with the finding %(finding)s"),
    _("the confidence that the caller gave"),
    _("closed cases of the blueprint"),
    _("cases without a finding"),
    _("cases of %(what)s"),
    _("cases of %(what)s to %(finding)s"),
    _("its confidence is between %(low)s and %(high)s (95%%), from %(cases)s cases of this kind"),
    _(
        "its confidence is between %(low)s and %(high)s (95%%), from %(cases)s cases of this "
        "kind, too few to trust, %(needed)s are needed"
    ),
    _("how fast the loss falls"),
    _("noise of the loss"),
    _("loss now / first loss"),
    _("held-out loss / training loss"),
    _("stable rank of the layer"),
    _("gradient of the layer / median"),
    _("update / weight"),
    _("dead units"),
    _("saturated units"),
    _("signal to noise of the gradient"),
    _("added parameters / the model's"),
    _("It serves %(own)s, not %(wanted)s."),
    _("A curator has disabled it."),
    _("The layer has it already."),
    _("It conflicts with %(other)s, which the layer has."),
    _("It needs %(others)s on the layer first."),
    _("Its smallest size adds %(parameters)s parameters; %(left)s are left in the budget."),
    _("It needs %(memory)s at least; the limit is %(limit)s."),
    _("an unknown amount of memory"),
    _("It takes %(latency)s at least; the limit is %(limit)s."),
    _("No size is within all limits at once."),
    _(
        "Score %(score)s against %(best)s of %(other)s; the largest gap is in %(term)s (%(own)s"
        " against %(others)s)."
    ),
)

VERDICTS = (
    _("The loss is not finite."),
    _("No data: %(count)s losses after maturity, %(needed)s are needed."),
    _("Harmful: the loss is %(loss)s above its forecast (± %(interval)s)."),
    _("It only observes and does no harm."),
    _("No data: no forecast is known."),
    _("It does no harm: %(shown)s; it cannot be tried on and off."),
    _("It lowers the held-out loss: %(shown)s."),
    _("Without it the held-out loss is better: %(shown)s."),
    _("The loss is %(loss)s above its forecast (± %(interval)s)."),
    _(
        "The loss is %(loss)s above its forecast (± %(interval)s). The host depends on it: "
        "%(shown)s."
    ),
    _("Its gain has gone: %(now)s at the last look; %(shown)s."),
    _("No data: %(count)s looks after maturity, %(needed)s are needed."),
    _("No gain above %(limit)s was shown: %(shown)s."),
    _("No data: neither a forecast nor a held-out loss is known."),
    _("It lowers the training loss: %(shown)s; no held-out loss."),
    _("No gain above %(limit)s was shown: %(shown)s; no held-out loss."),
    _("It costs held-out loss: %(shown)s; %(within)s."),
    _("It makes the layer cheaper: %(shown)s; %(within)s."),
    _("The loss is %(loss)s above its forecast (± %(interval)s). Here %(within)s."),
    _("Its cost is not known: %(shown)s. Here %(within)s."),
    _("a cheaper layer may cost %(share)s of the loss"),
    _("gain %(gain)s (95%%: %(low)s to %(high)s, %(looks)s looks)"),
    _("gain %(gain)s, too few looks (%(looks)s) for an interval"),
    _("%(gain)s ± %(interval)s against the forecast"),
    _("%(names)s came after it"),
    _("“%(finding)s” is over"),
    _("“%(finding)s” is still open"),
    _("it changes nothing"),
    _("nothing new was found in %(steps)s steps"),
)

SERVER = (
    _("it changes nothing, so nobody must approve it"),
    _("%(remedy)s, as it is"),
    _("%(name)s from %(low)s to %(high)s"),
    _("%(name)s from %(low)s to %(high)s, all uses together"),
    _("Nothing was changed."),
    _("Its files were set aside, and it is built again."),
    _("The trainer took the graft out by itself at step %(step)s."),
    _("The answer to the first one stays; nothing was changed."),
    _("The adaptation was ended. A deadline never applies anything."),
    _("The kernel was not sent to the run."),
    _("The job failed for good at attempt %(attempt)s; the run was not changed."),
    _("It is recorded as %(number)s (%(state)s). Take it out on its page if it is unwanted."),
    _("The server has commanded the trainer to remove the graft."),
    _("The model was not changed."),
    _("It stays kept. Undo the merge in the script, or go back to an older checkpoint."),
    _(
        "The run is quarantined until the trainer reports that it is gone. Take it out again, "
        "or resume the training from a checkpoint from before it."
    ),
    _("The adaptation is recorded as reverted; nothing was grafted again."),
    _("compiled %(times)s× on the worker, kept eager"),
    _("compiled %(times)s× on the worker, offered"),
    _("the graft was taken out before the kernel was ready"),
    _("neither builder nor trainer reported a result in time"),
    _("the graft is not in the model any more"),
    _("the kernel was compiled for another graft"),
    _("it expired before a step boundary came"),
    _("the run has registered again since"),
    _("the parameters are spread over several ranks, where no remedy is applied"),
    _("the trainer was started again"),
    _("the trainer was started again, and proposes anew"),
    _("not acknowledged in time"),
    _("the trainer has not reported for a day"),
    _("the trainer has stopped reporting"),
    _("certificate failed: %(why)s"),
    _("its rollback was requested before the restart"),
    _("the model holds a change whose adaptation has ended"),
    _("its finding was over at step %(step)s"),
    _("its plan has ended: %(why)s"),
    _("one of the random share"),
    _("The run was not started from a recipe, so Esper cannot start a branch of it."),
    _("It was not tried in shadow yet: only what was tried is admitted."),
    _("No frames arrive; %(free)s MiB are free."),
    _(
        "Frames grow by %(growth)s MiB a day before they are thinned; %(free)s MiB are free, "
        "enough for %(days)s days."
    ),
    _("defaults of Esper"),
    _("No closed decision has stored the probabilities of both policies yet."),
    _("%(cases)s of %(needed)s effective cases tell of both policies."),
    _(
        "%(challenger)s against %(incumbent)s: %(gain)s of reward (95%%: %(least)s to "
        "%(most)s), %(cases)s effective cases; shown to be better."
    ),
    _(
        "%(challenger)s against %(incumbent)s: %(gain)s of reward (95%%: %(least)s to "
        "%(most)s), %(cases)s effective cases; not shown to be better."
    ),
    _("nobody decided before the deadline"),
    _("no worker took the compile job before the deadline"),
    _("the compile job did not finish before the deadline"),
    _("the kernel was not sent to the trainer before the deadline"),
    _("the trainer did not accept the command before the deadline"),
    _("the trainer did not confirm the change before the deadline"),
    _("no verdict before the deadline"),
    _("the trainer did not confirm the rollback before the deadline"),
    _("the trainer did not report before the deadline"),
    _("Plan of %(count)s changes for run %(run)s"),
    _("the run has %(state)s"),
    _("the run is quarantined: %(why)s"),
    _("%(name)s has paused adaptation of this run"),
    _(
        "the run's error budget is used up, and it is only observed: adaptations that were taken "
        "out have cost %(used)s of the loss, at most %(most)s"
    ),
    _("Nothing is applied now: %(why)s"),
    _("blueprint %(slug)s is switched off: %(why)s"),
)

ALL = (*RULES, *WATCHES, *REMEDIES, *DECISIONS, *VERDICTS, *SERVER)
