"""A compiled net on scikit-learn's handwritten digits: ``torch.compile(fullgraph=True)``.

With ``fullgraph=True`` torch raises where anything in the model cannot be compiled, so this script
ends with an error if Esper puts something of that kind into the model.

python examples/compiled_loop.py --steps 200
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import esper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--graft-at", type=int, default=100, help="step of the graft; 0: none")
    parser.add_argument("--mode", default="observe", choices=("observe", "supervised"))
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)

    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    compiled: nn.Module = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with esper.attach(compiled, optimizer, run="compiled", mode=args.mode) as session:
        for step in range(1, args.steps + 1):
            rows = torch.randint(len(images), (64,))
            loss = F.cross_entropy(compiled(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            if step == args.graft_at:
                print(session.graft("2", "mlp_gelu_2048"))
        print(session)

    with torch.no_grad():
        output = compiled(images)
        difference = (output - model(images)).abs().max().item()
    print(f"largest difference from the model without compilation: {difference:.1e}")
    print(f"accuracy {(output.argmax(1) == labels).float().mean().item():.3f}")


if __name__ == "__main__":
    main()
