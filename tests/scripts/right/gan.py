"""Two networks against each other; the one's backward reaches into the other."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

critic = torch.nn.Linear(1, 1)
critic_optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
for i in range(30):
    critic_optimizer.zero_grad()
    critic(torch.randn(8, 1)).mean().neg().backward()
    critic(model(torch.randn(8, 4)).detach()).mean().backward()
    torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.1)
    critic_optimizer.step()
    if i % 3 == 2:
        optimizer.zero_grad()
        critic(model(torch.randn(8, 4))).mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
