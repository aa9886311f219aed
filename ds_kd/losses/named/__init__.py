"""Divergences that `kd_loss_fn.name` chooses.

A new one is a class in a file of this folder, with a `name`: nothing else mentions it. With p the
teacher's probabilities at temperature T, q the student's, r = log q - log p, and g the derivative
of a value with respect to q, the gradient that a class returns is

    d value / d(z_s/T) = q∘(g - Σ q·g).

A constant added to g changes nothing; it is chosen so that g is exactly 0 where p = q.
"""
