"""What model families share. From the bottom up:

* ``sites``, ``qk_sites``, ``activation_sites``, ``quantized_sites``: the fused calls of a model,
  each with its comparison with the unfused expression, for verification and the report
* ``norms``: which layer of :mod:`ditnorm.layers` stands in for a norm
* ``module``: what every fused body declares, and what patching asks it
* ``lora_linear``, ``gelu``, ``activation``, ``feed_forward``: linear layers and activations of
  an MLP
* ``quantized_weights``, ``int8_product``, ``quantized_linear``, ``bfl_linear``: linear layers with
  quantised weights
* ``laws``: whether an op is to quantise its result for the linear layers behind it
* ``attention``, ``pairwise_mask``: attention modules, whose query and key one op norms and rotates
* ``block``: the bodies that are looked for in a whole model
* ``adaln``: norms that make their own modulation; ``modulation/``: modulations from a table
* ``promotion``: modulations of another dtype than the stream
* ``flux``, ``sandwich``: the halves of blocks that several families share
"""
