"""How good the policy is: `accuracy` on problems it never trained on, with its uncertainty."""
