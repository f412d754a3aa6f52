import math

import pytest
import torch
from torch import nn

from interlayer.core.process import (
    DDIM,
    Ancestral,
    Diffusion,
    Euler,
    Flow,
    Guided,
    Heun,
    distance,
    frechet,
    integrate,
    kid,
    mmd,
    sample,
    sliced_wasserstein,
)


def drawn(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def linear(x, t):
    return 0.7 * x + 0.001 * t.view(-1, 1, 1, 1)


def learned(x, t):
    return torch.cat((linear(x, t), 0.3 * x), 1)


class TestAgainstDiffusers:
    def test_noise_and_velocity(self):
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
        (x0, noise), t = drawn((5, 2, 4, 4), (5, 2, 4, 4)), torch.tensor([0, 1, 300, 700, 999])
        torch.testing.assert_close(Diffusion().noised(x0, t, noise), scheduler.add_noise(x0, noise, t))

    @pytest.mark.parametrize(
        ("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
    )
    @pytest.mark.parametrize("clip", [None, 1.0])
    def test_ancestral(self, variance, theirs, clip):
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(
            1000,
            beta_start=1e-4,
            beta_end=0.02,
            variance_type=theirs,
            timestep_spacing="linspace",
            clip_sample=bool(clip),
        )
        scheduler.set_timesteps(20)
        process, model = Diffusion(variance=variance), learned if variance == "learned" else linear
        (z,) = drawn((3, 2, 4, 4))
        assert scheduler.timesteps.tolist() == process.times(20).tolist()[:-1]
        generator, x = torch.Generator().manual_seed(1), z
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(3)), t, x, generator=generator).prev_sample
        ours = integrate(
            model, process, Ancestral(), z, process.times(20), clip=clip, generator=torch.Generator().manual_seed(1)
        )
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
    @pytest.mark.parametrize("clip", [None, 1.0])
    def test_ddim(self, eta, clip):
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", clip_sample=bool(clip)
        )
        scheduler.set_timesteps(20)
        (z,) = drawn((3, 2, 4, 4))
        generator, x = torch.Generator().manual_seed(1), z
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(
                linear(x, t.expand(3)), t, x, eta=eta, generator=generator, use_clipped_model_output=True
            ).prev_sample
        generator = torch.Generator().manual_seed(1)
        ours = integrate(linear, Diffusion(), DDIM(eta), z, scheduler.timesteps, clip=clip, generator=generator)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)

    def test_euler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(20)
        (z,) = drawn((3, 2, 4, 4))
        x, process = z, Flow()
        for t in scheduler.timesteps:
            x = scheduler.step(linear(x, t.expand(3)), t, x).prev_sample
        times = torch.cat((scheduler.timesteps, torch.zeros(1)))
        for solver in (Euler(), DDIM()):  # on a straight path these are one
            torch.testing.assert_close(integrate(linear, process, solver, z, times), x, rtol=1e-4, atol=1e-5)
        (x0, noise), t = drawn((4, 2), (4, 2)), scheduler.timesteps[[0, 5, 10, 19]]
        torch.testing.assert_close(process.noised(x0, t, noise), scheduler.scale_noise(x0, t, noise))

    def test_models_learn_and_sample_unchanged(self):
        from diffusers import DiTTransformer2DModel, UNet2DModel

        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4, num_class_embeds=3,
        )  # fmt: skip
        dit = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1, sample_size=8,
            num_embeds_ada_norm=3,
        )  # fmt: skip
        y = torch.arange(16) % 3
        x0 = (y.view(-1, 1, 1, 1) - 1.0).expand(16, 1, 8, 8)
        for model, process in ((unet, Flow()), (unet, Diffusion()), (dit, Diffusion(variance="learned"))):
            optimiser, losses = torch.optim.Adam(model.parameters(), 2e-3), []
            for step in range(8):
                loss = process.loss(model, x0, y, generator=torch.Generator().manual_seed(step % 2))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
            assert losses[-1] + losses[-2] < losses[0] + losses[1]
            solver = Euler() if process.straight else Ancestral()
            runs = [sample(model, process, solver, (3, 1, 8, 8), y[:3], seed=s, steps=3) for s in (0, 0, 1)]
            assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2]) and model.training


class TestProcesses:
    def test_the_hybrid_loss_is_that_of_the_authors(self):
        """Figures of the diffusion code beside U-DiT (ADM's), commit 7fcce5e, for these numbers; at t = 0 it approximates the CDF."""
        generator = torch.Generator().manual_seed(0)
        x0 = torch.rand(6, 2, 4, 4, generator=generator) * 2 - 1
        noise = torch.randn(6, 2, 4, 4, generator=generator)
        output = torch.randn(6, 4, 4, 4, generator=generator) * 0.5
        process, t = Diffusion(variance="learned"), torch.tensor([0, 1, 10, 300, 700, 999])
        x = process.noised(x0, t, noise)
        bound = process.bound(output, x, x0, t)
        torch.testing.assert_close(bound[1:], torch.tensor([0.8734, 0.1247, 0.0079, 0.0208, 0.0123]), rtol=0, atol=6e-5)
        assert abs(bound[0] - 2.7430) < 5e-3
        assert abs(process.score(output, x, x0, noise, t) - 1.9262) < 1e-3

    def test_the_bound_moves_the_variance_alone(self):
        process, t = Diffusion(variance="learned"), torch.tensor([0, 400])
        x0, noise, output = drawn((2, 1, 3, 3), (2, 1, 3, 3), (2, 2, 3, 3))
        output.requires_grad_()
        process.score(output, process.noised(x0, t, noise), x0, noise, t).backward()
        gap = output.detach()[:, :1] - noise
        torch.testing.assert_close(output.grad[:, :1], 2 * gap / gap.numel())
        assert output.grad[:, 1:].abs().min() > 0

    @pytest.mark.parametrize("process", [Diffusion(), Flow()])
    def test_the_exact_model_gives_the_data_back(self, process):
        """With the model that knows the one clean item there is, every solver ends at it."""
        (truth,) = drawn((1, 2, 3, 3))

        def exact(x, t):
            alpha, sigma = process.broadcast(t, x)
            noise = (x - alpha * truth) / sigma
            return noise - truth if process.straight else noise

        for solver in (DDIM(), DDIM(0.5), *([Euler()] if process.straight else [Ancestral()])):
            found = sample(exact, process, solver, (4, 2, 3, 3), seed=0, steps=10)
            torch.testing.assert_close(found, truth.expand_as(found), rtol=1e-4, atol=1e-4)

    def test_posterior_is_bayes(self):
        """Mean and variance of x_s given x_t and x_0, from the joint Gaussian of the two."""
        process, t, s = Diffusion(), torch.tensor(600), torch.tensor(350)
        (x, x0) = drawn((2000, 1), (1, 1))
        (a_t, s_t), (a_s, s_s) = process.scales(t), process.scales(s)
        cross = a_t / a_s * s_s**2
        mean, variance, _ = process.posterior(x, x0, t, s)
        wanted = a_s * x0 + cross / s_t**2 * (x - a_t * x0)
        torch.testing.assert_close(mean, wanted.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance.squeeze(), (s_s**2 - cross**2 / s_t**2).float(), rtol=1e-4, atol=0)

    def test_orders(self):
        """The flow from N(0, 1) to N(0, c^2) has a velocity in closed form: Euler has order 1, Heun order 2."""
        process, c = Flow(1.0), 0.5

        def velocity(x, t):
            t = t.view(-1, 1)
            return x * (t - (1 - t) * c**2) / (t**2 + (1 - t) ** 2 * c**2)

        x = torch.ones(1, 1, dtype=torch.float64)
        for solver, order in ((Euler(), 1), (Heun(), 2)):
            errors = [
                float((integrate(velocity, process, solver, x, process.times(n).double()) - c).abs()) for n in (40, 80)
            ]
            assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1
        there = integrate(velocity, process, Heun(), x * c, process.times(80).double().flip(0))
        assert abs(float(there) - 1) < 1e-3  # and back: inversion

    def test_guidance_hooks_and_modes(self):
        class Model(nn.Module):
            def forward(self, x, t, y):
                assert not self.training
                return torch.cat((x * y.view(-1, 1), x + y.view(-1, 1)), 1)

        x, t, y = torch.ones(2, 1), torch.zeros(2), torch.tensor([2, 3])
        out = Guided(Model().eval(), 1.5, 1)(x, t, y)
        assert out.tolist() == [[1 + 1.5 * 1, 3], [1 + 1.5 * 2, 4]]
        seen, guided = [], Guided(Model(), 2.0, 0)

        def hook(step):
            seen.append((step.index, int(step.t), int(step.s)))
            step.x = step.x * 0

        found = sample(guided, Diffusion(variance="learned"), Ancestral(), (2, 1), y, seed=0, steps=3, hooks=[hook])
        assert seen == [(0, 999, 500), (1, 500, 0), (2, 0, -1)] and not found.any() and guided.model.training

    def test_errors(self):
        with pytest.raises(ValueError, match="variance 'other'"):
            Diffusion(variance="other")
        with pytest.raises(ValueError, match="0 < low <= high < 1"):
            Diffusion(low=0.5, high=0.1)
        with pytest.raises(ValueError, match="2000 sampling steps; expected 1 to 1000"):
            Diffusion().times(2000)
        with pytest.raises(ValueError, match="at least 1"):
            Flow().times(0)
        with pytest.raises(ValueError, match="no constant velocity"):
            sample(linear, Diffusion(), Heun(), (1, 1, 2, 2), seed=0, steps=2)
        with pytest.raises(ValueError, match="takes a Diffusion"):
            sample(linear, Flow(), Ancestral(), (1, 1, 2, 2), seed=0, steps=2)
        with pytest.raises(ValueError, match=r"gives \(2, 1, 4, 4\); expected \(2, 2, 4, 4\)"):
            Diffusion(variance="learned").loss(linear, torch.zeros(2, 1, 4, 4))
        with pytest.raises(ValueError, match="gives no variance"):
            sample(linear, Diffusion(variance="learned"), Ancestral(), (1, 1, 2, 2), seed=0, steps=2)
        with pytest.raises(ValueError, match="1 conditions for 2 null values"):
            Guided(linear, 1.0, 0, 0)(torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.zeros(1))


class TestDistances:
    def test_naive_twins(self):
        x, y = drawn((7, 3), (9, 3))
        y = y + 1

        def naive(kernel):
            n, m = len(x), len(y)
            a = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
            b = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
            return a + b - 2 * sum(kernel(u, v) for u in x for v in y) / (n * m)

        width = torch.pdist(y).median()
        torch.testing.assert_close(
            mmd(x, y),
            naive(lambda u, v: (-(u - v).square().sum() / (2 * width**2)).exp()).double(),
            rtol=1e-5,
            atol=1e-6,
        )
        torch.testing.assert_close(kid(x, y), naive(lambda u, v: (u @ v / 3 + 1) ** 3).double(), rtol=1e-5, atol=1e-5)

    def test_unbiased(self):
        """Over many pairs of sets of one distribution, the U-statistics are 0 on average; Fréchet's distance is not."""
        pairs = [drawn((8, 2), (12, 2), seed=s) for s in range(300)]
        for measure, biased in ((mmd, False), (kid, False), (frechet, True)):
            found = torch.stack([measure(x, y) for x, y in pairs])
            assert bool(found.mean() > 4 * found.std() / 300**0.5) is biased

    def test_frechet_of_gaussians(self):
        from scipy.linalg import sqrtm

        x, y = drawn((40, 4), (30, 4))
        y = y * torch.tensor([1.0, 2, 0.5, 1]) + 1
        a, b = torch.cov(x.T.double()), torch.cov(y.T.double())
        wanted = (x.mean(0) - y.mean(0)).square().sum() + (a + b).trace() - 2 * sqrtm((a @ b).numpy()).real.trace()
        torch.testing.assert_close(frechet(x, y), wanted.double(), rtol=1e-6, atol=1e-6)

    def test_sliced_wasserstein(self):
        x = drawn((50, 3))[0]
        shift = torch.tensor([3.0, 0, 0])
        found = sliced_wasserstein(x, x + shift, projections=4000)
        assert abs(float(found) - 3 / 3**0.5) < 0.05  # a direction's share of the shift, squared, is 1/3 on average
        assert float(sliced_wasserstein(x, x.repeat(3, 1))) < 1e-6

    def test_floor(self):
        real = drawn((200, 2))[0]
        same, other = (distance(mmd, samples, real) for samples in (drawn((50, 2), seed=9)[0], real[:50] + 1))
        assert abs(same.value - same.floor) < 4 * same.deviation < other.value - other.floor and same.count == 50
        with pytest.raises(ValueError, match="50 samples and 40 real items"):
            distance(mmd, real[:50], real[:40])
        with pytest.raises(ValueError, match="not finite"):
            mmd(real * torch.nan, real)
        with pytest.raises(ValueError, match="as many features"):
            kid(real, real[:, :1])
