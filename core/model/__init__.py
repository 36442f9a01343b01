"""The GPT: plain modules over parallel layers. No branch on the size of any axis."""
