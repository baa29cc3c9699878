"""Esper in a framework's training loop. Each module needs its framework, so import it by name:

``lightning.EsperCallback``    a callback for ``lightning.pytorch.Trainer``
``huggingface.EsperCallback``  a callback for ``transformers.Trainer``
``accelerate.attach``, ``accelerate.step``  for a loop that Accelerate prepares
"""
