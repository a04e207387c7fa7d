"""The ops in plain PyTorch: the specification of each, its checks and its gradients.

* ``options``: the values that options take; ``quantization``: the laws of quantisers
* ``calls*``: the arguments of an op as one structure
* ``reference*``: an op in one screen of PyTorch, the specification and the fallback
* ``expect``, ``checks*``: what is wrong with a call, and whether a kernel takes it
* ``table``: a row for each op, from which its schema, fake and Python body are made
* ``autograd``, ``gradients*``: how autograd is given the gradients; ``made_again``: what an adapter
  needn't keep for them
* ``context``, ``layout``, ``bits``: what surrounds a call, memory layout, comparison of bits

Suffixes name the ops: ``_qk``, ``_activation``, ``_quantize``, and ``_backward`` for those that
make gradients. Without one a file has those of norm sites; ``calls`` has query and key and the
activations, too.
"""
