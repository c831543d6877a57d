"""The one training loop, which knows nothing of what a method optimises.

``run`` goes from a configuration to a finished run folder, ``loop`` trains, and one small module holds each thing the
loop needs: ``draw`` (randomness), ``roles`` (networks made ready), ``precision``, ``optimizer``, ``average`` (EMA),
``checkpoint`` and ``state`` (what is saved and restored), ``meters`` and ``callbacks`` (what is reported), ``signals``.
"""
