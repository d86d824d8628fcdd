"""What the tests share: the numerics contract and the checks that every operator passes."""
