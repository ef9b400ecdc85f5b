"""Cross-entropy and its gradient from scratch: the one file to read first.

Run it: python examples/from_scratch.py

N rows (examples), V classes. z holds a score for each class of each row: the logits.
"""

import torch

import crossent


def softmax(z):  # (N, V) -> (N, V)
    """Scores become probabilities: positive, and one in total for each row."""
    e = torch.exp(z - z.max(dim=1, keepdim=True).values)  # minus the maximum: exp cannot overflow
    return e / e.sum(dim=1, keepdim=True)


def cross_entropy(z, target):  # (N, V), (N,) -> 0-d
    """The mean of -ln p over the rows, where p is the probability of each row's correct class."""
    top = z.max(dim=1).values
    log_sum = top + torch.log(torch.exp(z - top[:, None]).sum(dim=1))  # ln of the sum of all exps
    correct = z[torch.arange(len(z)), target]  # the score of the correct class
    return (log_sum - correct).mean()  # -ln p = ln(sum of exps) - z, without taking ln of a tiny p


def gradient(z, target):  # (N, V), (N,) -> (N, V)
    """How the loss changes with each score: softmax minus target, divided by the rows."""
    y = torch.zeros_like(z)
    y[torch.arange(len(z)), target] = 1  # the target as a distribution: all on the correct class
    return (softmax(z) - y) / len(z)


def main():
    """Print each number beside the library's, and beside what autograd finds."""
    z = torch.tensor([[-1.6453, 1.8893], [1.9800, 1.7681], [2.8183, 4.6643]])
    target = torch.tensor([0, 1, 1])

    print(f"probabilities\n{softmax(z)}")
    print(f"loss          {cross_entropy(z, target):.6f}")
    print(f"the library's {crossent.cross_entropy(z, target):.6f}")

    z.requires_grad_()
    cross_entropy(z, target).backward()
    print(f"gradient, softmax minus target\n{gradient(z.detach(), target)}")
    print(f"gradient, found by autograd\n{z.grad}")

    # Where the library differs: this row is nearly certain, and its loss is 2e-9, not 0.
    sure, zero = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
    print(f"a confident row: {cross_entropy(sure, zero):.4e} from scratch, ", end="")
    print(f"{crossent.cross_entropy(sure, zero):.4e} from the library")


if __name__ == "__main__":
    main()
