"""From logits to text: greedy, sampled and beam search under constraints, in a compiled loop."""
