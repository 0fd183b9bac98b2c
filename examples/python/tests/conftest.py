import torch

# The tests are small; the bits do not depend on it as long as it stays the same within a pass.
torch.set_num_threads(2)
