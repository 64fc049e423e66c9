"""Proof that the proof can fail: break the code on purpose, one line at a time, and see the named test notice.

Every entry of MUTANTS replaces one exact piece of text in a *copy* of the source files, imports the copy, and runs the very test, on
the very examples, that guards the shipped code. The mutant must die by an assertion of that test (or by the error named in `dies`).
A mutant that survives is a missing test; a text that no longer occurs exactly once is a stale mutant, and fails too. Try it by hand:
make one of these changes in the source, run pytest, read the message.
"""

import re
import shutil
from typing import NamedTuple

import pytest
import torch

import test_cache as cache
import test_flow as flow
import test_full_rank as full_rank
import test_objectives as objectives
import test_parallel as parallel
import test_rope as rope
import test_routes as routes
import test_streaming as streaming
from lab import FILES, ROOT, load_from

ANY = (AssertionError, RuntimeError, IndexError, ValueError)   # for breakages whose shapes no longer fit: a crash is a clear failure too


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    test: object
    dies: object = AssertionError


ROPE, CACHE, ATTENTION, MODEL, CHECKPOINT, COMPILED, SAMPLE, PARALLEL, OBJECTIVES, TRAINER, TRAIN = (name + ".py" for name in FILES)

MUTANTS = [Mutant(*entry) for entry in (
    # ---- position ----
    ("pairs are (i, i + d/2), the llama layout", ROPE, ".unflatten(-1, (-1, 2)).unbind(-1)",
     ".unflatten(-1, (2, -1)).unbind(-2)", rope.test_rotation_is_complex_multiplication),
    ("rotation turns the wrong way", ROPE, "return angle.cos(), angle.sin()", "return angle.cos(), -angle.sin()",
     rope.test_rotation_is_complex_multiplication),
    ("rotation is a reflection", ROPE, "a * sin + b * cos", "a * sin - b * cos",
     rope.test_rotation_keeps_lengths_composes_and_undoes),
    ("h and w axes swapped", ROPE, "coords[:, axis, None]", "coords[:, (0, 2, 1)[axis], None]",
     rope.test_a_step_along_one_axis_turns_that_axis_channels_alone),
    ("tokens counted column by column", ROPE, 'torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)',
     'torch.meshgrid(*axes, indexing="ij"), dim=-1).transpose(1, 2).flatten(0, 2)',
     rope.test_tokens_are_laid_out_frame_by_frame_row_by_row),
    ("time axis ignored", ROPE, "coords[:, axis, None]", "coords[:, max(axis, 1), None]",
     rope.test_scores_depend_on_differences_only_along_each_axis),
    ("bands of the narrow key spread over its own width", ROPE, "(-i / full)", "(-i / mine)",
     rope.test_a_narrow_key_turns_like_the_fastest_channels_of_a_full_head),
    ("remainder of pairs goes to width", ROPE, "return channels // 2 - 2 * third, third, third",
     "return third, third, channels // 2 - 2 * third", rope.test_the_split_of_channels_is_the_papers),
    ("angles in the model's low precision", ROPE, "dtype = torch.promote_types(dtype, torch.float32)", "pass",
     rope.test_angles_stay_in_float32_when_the_model_does_not),
    ("slots of a wide key interleaved", ROPE, "torch.cat(angles * self.copies, dim=-1)",
     "torch.cat(angles, dim=-1).repeat_interleave(self.copies, -1)", rope.test_copies_give_every_head_its_own_slot),

    # ---- attention ----
    ("scale without R", ATTENTION, "self.scale = (N + R) ** -0.5", "self.scale = N ** -0.5",
     routes.test_the_latent_layer_is_the_papers_equations),
    ("scale dropped where there are few scores", ATTENTION, "(q @ k.mT * scale)", "(q @ k.mT)",
     routes.test_every_route_is_torchs_own_attention),
    ("rope key rotated twice", ATTENTION, "shared = rotate(k_rope, k_table)[:, None]",
     "shared = rotate(rotate(k_rope, k_table), k_table)[:, None]", routes.test_every_route_is_the_papers_equations),
    ("rope key not rotated at all", ATTENTION, "k = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)",
     "k = torch.cat((c_kv, k_rope), dim=-1)", routes.test_every_route_is_the_papers_equations),
    ("rope query not rotated in the reference", ATTENTION,
     'einsum(rotate(q_rope, q_table), rotate(k_rope, k_table), "b l h r', 'einsum(q_rope, rotate(k_rope, k_table), "b l h r',
     routes.test_every_route_is_torchs_own_attention),
    ("W_UK and W_UV swapped", ATTENTION, "for W in (self.W_UK, self.W_UV))", "for W in (self.W_UV, self.W_UK))",
     routes.test_the_latent_layer_is_the_papers_equations, ANY),
    ("latent cached before its norm", ATTENTION, "return self.norm_kv(self.W_DKV(x)), self.W_KR(x)",
     "return self.W_DKV(x), self.W_KR(x)", routes.test_the_latent_layer_is_the_papers_equations),
    ("query latent norm skipped", ATTENTION, "q = self.norm_q(self.W_DQ(x))", "q = self.W_DQ(x)",
     routes.test_the_latent_layer_is_the_papers_equations),
    ("output projection reads heads in the wrong order", ATTENTION, "return self.W_O(o.flatten(2))",
     "return self.W_O(o.transpose(2, 3).flatten(2))", routes.test_the_latent_layer_is_the_papers_equations),
    ("rows of (head, query) read as (query, head)", ATTENTION, '"b 1 (l h) c -> b l h c"', '"b 1 (h l) c -> b l h c"',
     routes.test_every_route_is_the_papers_equations),
    ("V taken from the rope columns", ATTENTION, "k[:, None], c_kv[:, None], mask, scale)",
     "k[:, None], k[:, None, :, -c_kv.shape[-1]:], mask, scale)", routes.test_every_route_is_the_papers_equations),
    ("top-left causal mask instead of the one given", ATTENTION, "attn_mask=mask, scale=scale)",
     "is_causal=mask is not None, scale=scale)", routes.test_every_route_is_the_papers_equations),
    ("silent fallback to unmasked softmax, few scores", ATTENTION, 'q.device.type == "cpu" and mask is None and',
     'q.device.type == "cpu" and', routes.test_every_route_is_the_papers_equations),
    ("silent fallback to unmasked softmax, reference", ATTENTION, "if mask is not None:\n        score = score.masked_fill",
     "if False:\n        score = score.masked_fill", cache.test_a_masked_key_never_reaches_an_output),
    ("mask repeated for (head, query) rows", ATTENTION, "mask.repeat_interleave(heads, dim=0)", "mask.repeat(heads, 1)",
     routes.test_every_route_is_the_papers_equations),
    ("half of a gradient cut", ATTENTION, 'q_latent = einsum(q_nope, W_UK, "b l h n, h n c -> b l h c")',
     'q_latent = einsum(q_nope, (W_UK + W_UK.detach()) / 2, "b l h n, h n c -> b l h c")',
     routes.test_the_routes_have_the_same_gradients),
    ("probabilities rounded to half", ATTENTION, ".softmax(dim=-1) @ v ", ".softmax(dim=-1).half().to(v.dtype) @ v ",
     routes.test_every_route_is_torchs_own_attention),
    ("keys of the dense baseline not rotated", ATTENTION, "rotate(q, q_table), rotate(k, k_table)", "rotate(q, q_table), k",
     routes.test_the_dense_baseline_is_standard_attention),
    ("values up-projected once per query in the cost model", ATTENTION, "2 * L * H * C * (N + V)", "2 * T * H * C * (N + V)",
     routes.test_the_cost_model_is_torchs_own_count),
    ("crossing forgets the values", ATTENTION, "C * (N + V) / (2 * C - N - V)", "C * (N + V) / (2 * C - N)",
     routes.test_auto_takes_the_route_with_fewer_operations),
    ("auto takes the dearer route", ATTENTION, 'return min(("materialised"', 'return max(("materialised"',
     routes.test_auto_takes_the_route_with_fewer_operations),
    ("batch taken for queries in the choice of route", ATTENTION, "choose_route(L, T, H,", "choose_route(B, T, H,",
     routes.test_a_layer_left_to_itself_takes_the_cheaper_route),
    ("latents taken for value channels in the choice of route", ATTENTION, "self.W_UV.out_features // H",
     "self.W_UV.in_features // H", routes.test_a_layer_left_to_itself_takes_the_cheaper_route),
    ("a crossing where there is none", ATTENTION, "if 2 * C > N + V else", "if 3 * C > N + V else",
     routes.test_auto_takes_the_route_with_fewer_operations),

    # ---- from_dense ----
    ("softmax scale of the narrow layer, not the dense one's", ATTENTION, "norm=False, scale=dense.scale)", "norm=False)",
     full_rank.test_a_slot_per_head_is_standard_attention_with_rope, (AssertionError, ZeroDivisionError)),
    ("keys not scaled back after the balance", ATTENTION, "up[:H * N] * k_size", "up[:H * N]",
     full_rank.test_content_at_full_rank_is_standard_attention),
    ("keys and values not balanced", ATTENTION, "W.norm() if W.numel()", "W.norm() * 0 + 1 if W.numel()",
     full_rank.test_below_full_rank_the_error_is_the_tail_of_the_singular_values),
    ("singular values forgotten", ATTENTION, "up = U[:, :C] * S[:C]", "up = U[:, :C]",
     full_rank.test_content_at_full_rank_is_standard_attention),
    ("the smallest singular vectors kept", ATTENTION, "mla.W_DKV.weight.copy_(Z[:C])", "mla.W_DKV.weight.copy_(Z[-C:])",
     full_rank.test_below_full_rank_the_error_is_the_tail_of_the_singular_values),
    ("W_O not taken over", ATTENTION, "mla.W_O.weight.copy_(dense.W_O.weight)", "pass",
     full_rank.test_content_at_full_rank_is_standard_attention),
    ("shared key of the first head, not the mean", ATTENTION, ".mean(dim=0))", "[0])",
     full_rank.test_a_shared_narrow_key_is_exact_where_heads_agree),
    ("slowest axis stretches chosen", ATTENTION, "start += 2 * full", "start += 2 * mine",
     rope.test_a_narrow_key_turns_like_the_fastest_channels_of_a_full_head),
    ('init="random" is spectral', ATTENTION, 'if init == "random":', "if False:",
     full_rank.test_random_initialisation_keeps_the_sizes_and_nothing_else),

    # ---- cache ----
    ("sink evicted", CACHE, "self.sink + (ring - self.sink) % max(self.ring, 1)", "ring % max(self.slots, 1)",
     cache.test_the_cache_is_a_list_of_frames, ANY),
    ("ring off by one", CACHE, "(ring - self.sink) % max", "(ring - self.sink + 1) % max",
     cache.test_the_cache_is_a_list_of_frames),
    ("stale slot visible", CACHE, "return min(self.seen, self.slots)", "return self.slots",
     cache.test_the_cache_is_a_list_of_frames, ANY),
    ("peek reads slots that are not in use", CACHE, ":self.filled * self.tokens]", ":self.slots * self.tokens]",
     cache.test_the_cache_is_a_list_of_frames, ANY),
    ("frame labels off by one turn", CACHE, "(self.seen - 1 - slot)", "(self.seen - slot)",
     cache.test_the_cache_is_a_list_of_frames),
    ("position of the chunk off by one after eviction", CACHE, "return min(self.seen, self.horizon - self.chunk)",
     "return min(self.seen, self.horizon - self.chunk + 1)", cache.test_the_cache_is_a_list_of_frames),
    ("window not re-indexed beyond the horizon", CACHE, "frames - (self.seen - base))", "frames)",
     cache.test_the_cache_is_a_list_of_frames),
    ("sink moves with the window", CACHE, "torch.where(frames < self.sink, frames,", "torch.where(frames < 0, frames,",
     cache.test_streaming_with_the_ring_is_streaming_with_a_list),
    ("chunk placed before its past", CACHE, "torch.cat((buffer[layer, :, :self.filled * self.tokens], new), dim=1)",
     "torch.cat((new, buffer[layer, :, :self.filled * self.tokens]), dim=1)", cache.test_the_cache_is_a_list_of_frames),
    ("reset forgets nothing", CACHE, 'keep the memory."""\n        self.seen = 0', 'keep the memory."""',
     cache.test_the_cache_is_a_list_of_frames),
    ("gradient leaks through the cache", CACHE, "new.detach() if detach else new", "new",
     cache.test_no_gradient_passes_through_the_cache),
    ("detach=False detaches all the same", CACHE, "new.detach() if detach else new", "new.detach()",
     cache.test_no_gradient_passes_through_the_cache),
    ("commit overwrites what earlier reads wait for", CACHE, "view.index_copy(2, slots, new) if torch.is_grad_enabled() else",
     "", cache.test_the_cache_is_a_list_of_frames),
    ("commit copies the buffers every time", CACHE, "view.index_copy_(2, slots, new)",
     "view.clone().index_copy_(2, slots, new)", cache.test_the_cache_is_a_list_of_frames),
    ("bytes counted as numbers", CACHE, "buffer.shape[-1] * buffer.element_size()", "buffer.shape[-1]",
     cache.test_the_paper_saves_93_percent_of_the_bytes),
    ("smallest window refused", CACHE, "if window < sink + chunk:", "if window <= sink + chunk:",
     cache.test_impossible_windows_are_refused_in_words, ANY),

    # ---- the model ----
    ("<= for < in the noisy-to-clean cell", MODEL, "past = (b < a) &", "past = (b <= a) &",
     streaming.test_a_frame_depends_on_what_mask_and_depth_allow_and_on_nothing_else),
    ("the past's noise is visible", MODEL, "own | (past & ~k_noisy)", "own | past", streaming.test_the_mask_is_the_table),
    ("clean and noisy see each other in a chunk", MODEL, "(b == a) & (q_noisy == k_noisy)", "(b == a)",
     streaming.test_a_frame_depends_on_what_mask_and_depth_allow_and_on_nothing_else),
    ("causal inside a chunk", MODEL, "own = (b == a) &", "own = (b == a) & (k_frame <= q_frame) &",
     streaming.test_the_mask_is_the_table),
    ("training sees a longer window than inference", MODEL, "(config.window - config.chunk - config.sink)",
     "(config.window - config.sink)", streaming.test_teacher_forcing_is_streaming),
    ("training forgets the sink", MODEL, "(recent | (k_frame < config.sink))", "recent",
     streaming.test_teacher_forcing_is_streaming),
    ("not causal in training: mask built and not used", MODEL, "q_table, k_table, mask, route)\n        x = ",
     "q_table, k_table, None, route)\n        x = ",
     streaming.test_a_frame_depends_on_what_mask_and_depth_allow_and_on_nothing_else),
    ("spans lose the last frame of a run", MODEL, "slice(a * P, b * P) for a, b in run",
     "slice(a * P, (b - 1) * P or P) for a, b in run", streaming.test_spans_are_the_mask_in_block_form),
    ("the wrong half of the mask asks in the last block", MODEL, "return mask[first:]", "return mask[:-first]",
     streaming.test_spans_are_the_mask_in_block_form),
    ("clean half told its noisy half's level", MODEL, "torch.cat((torch.zeros_like(sigma), sigma), dim=1)",
     "torch.cat((sigma, sigma), dim=1)", streaming.test_teacher_forcing_is_streaming),
    ("noisy half stands behind the clean half", MODEL, "caption, frame, frame, route, mask=mask",
     "caption, half + frame, half + frame, route, mask=mask",
     streaming.test_every_layer_inside_the_model_is_the_papers_equations),
    ("commit at sigma 1", MODEL, "x.new_zeros(x.shape[:2])", "x.new_ones(x.shape[:2])",
     streaming.test_teacher_forcing_is_streaming),
    ("commit during denoising", MODEL, "return self._cached(x, sigma, caption, cache, route)[0]",
     "v, rows = self._cached(x, sigma, caption, cache, route); cache.commit(rows); return v",
     cache.test_denoising_leaves_no_trace),
    ("all layers read the first layer's cache", MODEL, "cache.peek(i, rows)", "cache.peek(0, rows)",
     streaming.test_teacher_forcing_is_streaming),
    ("not autoregressive: the cache is never read", MODEL, "if cache is None else", "if True else",
     streaming.test_teacher_forcing_is_streaming, ANY),
    ("keys stand after the chunk, not before", MODEL, "torch.cat((past, own)), route", "torch.cat((own, past)), route",
     streaming.test_teacher_forcing_is_streaming),
    ("un-patchify scrambles columns", MODEL, '"b f (h w) (c p q) -> b f c (h p) (w q)"',
     '"b f (h w) (c p q) -> b f c (h p) (q w)"', streaming.test_patches_go_back_where_they_came_from),
    ("un-patchify transposes each patch", MODEL, '"b f (h w) (c p q) -> b f c (h p) (w q)"',
     '"b f (h w) (c q p) -> b f c (h p) (w q)"', streaming.test_patches_go_back_where_they_came_from),
    ("caption always empty", MODEL, "self.words(caption)", "self.words(caption * 0)",
     streaming.test_caption_and_noise_level_count),
    ("noise level not told to the network", MODEL, "sinusoid(sigma, 256)", "sinusoid(sigma * 0, 256)",
     streaming.test_caption_and_noise_level_count),
    ("time axis reversed in the embedding", MODEL, "angle = 1000 * sigma[", "angle = 1000 * (1 - sigma)[",
     streaming.test_sigma_0_is_clean_and_sigma_1_is_noise),
    ("bands of the noise level too close", MODEL, "device=sigma.device) / (width // 2))", "device=sigma.device) / width)",
     streaming.test_sigma_0_is_clean_and_sigma_1_is_noise),
    ("gates do not start at zero", MODEL, "self.level[1].weight.zero_()", "pass",
     streaming.test_a_new_model_is_silent_until_it_learns),
    ("places counted from the wrong end", MODEL, "self.embed(x) + self.place ", "self.embed(x) + self.place.flip(0) ",
     streaming.test_the_whole_network_is_a_page_of_numpy),
    ("shift and scale exchanged", MODEL, "modulate(F.layer_norm(x, (E,)), s1, c1)", "modulate(F.layer_norm(x, (E,)), c1, s1)",
     streaming.test_the_whole_network_is_a_page_of_numpy),
    ("FFN behind the gate of attention", MODEL, "torch.addcmul(x, g2, self.ffn", "torch.addcmul(x, g1, self.ffn",
     streaming.test_the_whole_network_is_a_page_of_numpy),
    ("caption asked without its norm", MODEL, "self.norm_caption(x).flatten(1, 2)", "x.flatten(1, 2)",
     streaming.test_the_whole_network_is_a_page_of_numpy),
    ("rope channels taken on top of the head's own", MODEL, "N=E // config.heads - config.rope", "N=E // config.heads",
     streaming.test_weights_have_the_papers_sizes),
    ("cache in float32 whatever the model", MODEL, "dtype=dtype or weight.dtype)", "dtype=dtype or torch.float32)",
     streaming.test_dtype_is_kept),
    ("positions made on the CPU", CACHE, "slot = torch.arange(self.filled, device=self.buffers[0].device)",
     "slot = torch.arange(self.filled)", streaming.test_device_is_kept_and_nothing_waits_for_it, ANY),

    # ---- flow matching and rollout ----
    ("wrong sign of the target", OBJECTIVES, "(eps - x0)", "(x0 - eps)", flow.test_the_loss_of_the_true_velocity_is_zero),
    ("one noise level spread over chunks", OBJECTIVES, ".repeat_interleave(chunk, dim=1)", ".repeat(1, chunk)",
     flow.test_the_loss_of_the_true_velocity_is_zero),
    ("captions kept when they should be dropped", OBJECTIVES, ">= drop)", "< drop)",
     flow.test_captions_are_dropped_as_often_as_the_recipe_says),
    ("path runs backwards in training and sampling alike", SAMPLE, "(1 - sigma) * x0 + sigma * eps",
     "sigma * x0 + (1 - sigma) * eps", flow.test_the_algebra_of_the_path),
    ("Euler step the wrong way", SAMPLE, "x = x - (now - then) * v", "x = x + (now - then) * v",
     flow.test_the_sampler_follows_the_true_velocity_to_the_data),
    ("sampler starts at the clean end", SAMPLE, "[shift(1 - i / steps, FEW", "[shift(i / steps, FEW",
     flow.test_the_sampler_follows_the_true_velocity_to_the_data, (AssertionError, ZeroDivisionError)),
    ("chunks never committed", SAMPLE, "model.commit(x, caption, memory, route)", "pass",
     flow.test_the_first_chunks_noise_reaches_the_second_chunk),
    ("a chunk committed twice", SAMPLE, "model.commit(x, caption, memory, route)",
     "[model.commit(x, caption, memory, route) for _ in range(2)]",
     flow.test_a_rollout_is_autoregressive_and_a_function_of_its_seed),
    ("guidance with one shared cache", SAMPLE, "memory_none = model.make_cache(len(caption)) if guidance != 1 else None",
     "memory_none = memory", flow.test_guidance_keeps_two_caches),
    ("guidance of another convention", SAMPLE, "v = v_none + guidance * (v - v_none)", "v = v + guidance * (v - v_none)",
     flow.test_guidance_keeps_two_caches),
    ("the seed is ignored", SAMPLE, "torch.randn(shape, generator=generator, device=home)", "torch.randn(shape, device=home)",
     flow.test_a_rollout_is_autoregressive_and_a_function_of_its_seed),

    # ---- the objectives of the stages ----
    ("score model trained with a level per frame", OBJECTIVES, "torch.randn(len(x0), 1, **draw)", "torch.randn(*x0.shape[:2], **draw)",
     objectives.test_the_score_model_has_one_noise_level_per_video),
    ("teacher guided by another convention", OBJECTIVES, "return none + weight * (v - none)", "return v + weight * (v - none)",
     objectives.test_the_consistency_target_is_the_answer_after_one_guided_euler_step),
    ("consistency grid never reaches the anchor", OBJECTIVES, "shift(1 - (j + 1) / GRID", "shift(1 - (j + 0.5) / GRID",
     objectives.test_the_consistency_target_is_the_answer_after_one_guided_euler_step),
    ("student is its own target", OBJECTIVES, "next_level * target(", "next_level * student(",
     objectives.test_the_consistency_target_is_the_answer_after_one_guided_euler_step),
    ("teacher steps away from the data", OBJECTIVES, "x - (level - next_level) * v", "x + (level - next_level) * v",
     objectives.test_the_consistency_target_is_the_answer_after_one_guided_euler_step),
    ("distribution matching away from the data", OBJECTIVES, "(mu_fake - mu_real) / size", "(mu_real - mu_fake) / size",
     objectives.test_the_dmd_gradient_is_the_difference_of_the_answers),
    ("one normaliser for the whole batch", OBJECTIVES, ".flatten(1).mean(dim=1).clamp(min=1e-3)", ".mean().clamp(min=1e-3)[None]",
     objectives.test_the_dmd_gradient_is_the_difference_of_the_answers),
    ("stop-gradient on the video, not on its goal", OBJECTIVES, "(video - (video - gradient).detach())", "(video.detach() - (video - gradient))",
     objectives.test_the_dmd_gradient_is_the_difference_of_the_answers),
    ("guidance of the real score forgotten", OBJECTIVES, "sigma, caption), caption, guidance)", "sigma, caption), caption, 1)",
     objectives.test_guidance_sharpens_the_real_score_alone),
    ("critic sends its gradient into the generator", OBJECTIVES, "video = video.detach()", "pass",
     objectives.test_the_critic_learns_the_generators_videos_and_touches_them_not),
    ("scores compared at levels where they say nothing", OBJECTIVES, ".clamp(0.02, 0.98)", "",
     objectives.test_the_critic_learns_the_generators_videos_and_touches_them_not),
    ("few-step levels of another shift", SAMPLE, "FEW_SHIFT = 4, 5.0", "FEW_SHIFT = 4, 3.0",
     objectives.test_the_few_step_sampler_has_the_literatures_levels_and_fresh_noise),
    ("Euler steps in the few-step sampler", SAMPLE, "if few or leave:", "if leave:",
     objectives.test_the_few_step_sampler_has_the_literatures_levels_and_fresh_noise),
    ("the same noise at every level", SAMPLE, "x = add_noise(x, noise(), ", "x = add_noise(x, torch.ones_like(x), ",
     objectives.test_the_few_step_sampler_has_the_literatures_levels_and_fresh_noise),
    ("gradient through every pass of a rollout", SAMPLE, "set_grad_enabled(record and leave)", "set_grad_enabled(record)",
     objectives.test_the_gradient_is_that_of_one_pass_of_the_last_chunk_and_nothing_else),
    ("training's past is made by fewer passes than in use", OBJECTIVES, "c.frames - c.chunk, **how)", "c.frames - c.chunk, exit=exit, **how)",
     objectives.test_the_gradient_is_that_of_one_pass_of_the_last_chunk_and_nothing_else, ANY),
    ("exit one pass early", SAMPLE, "leave = step == exit", "leave = step + 1 == max(exit or 9, 1)",
     objectives.test_the_gradient_is_that_of_one_pass_of_the_last_chunk_and_nothing_else, ANY),
    ("caption changes a chunk late", SAMPLE, "next(iter(switch)) <= made", "next(iter(switch)) < made",
     objectives.test_a_caption_changes_with_the_chunk_that_it_is_given_for),
    ("window rolled the wrong way when renamed", CACHE, ".roll(-oldest, 2)", ".roll(oldest, 2)",
     objectives.test_a_renamed_window_keeps_its_order),
    ("renamed window stands before the horizon", CACHE, "turns = -(-(self.horizon", "turns = -(-(-self.horizon + 2 * self.slots",
     objectives.test_an_old_window_can_be_renamed, ANY),
    ("critic's gradient taken by the generator's optimiser", TRAINER, "return self.critic.step(", "return self.learner.step(",
     objectives.test_generator_and_critic_leave_each_other_alone),
    ("rate ignored", TRAINER, "before, 1 - rate)", "before, 0 * rate)", objectives.test_a_step_drawn_back_is_a_step_at_a_lower_rate),
    ("Muon's iteration begins by rounding to bfloat16", PARALLEL, "x = x / x.norm().clamp(min=eps)",
     "x = (x / x.norm().clamp(min=eps)).bfloat16().to(x.dtype)", parallel.test_muons_iteration_is_its_polynomial_and_no_rounding_grows_in_it),
    ("Muon's iteration without its fifth power", PARALLEL, "beta=b, alpha=c)", "beta=b, alpha=0)",
     parallel.test_muons_iteration_is_its_polynomial_and_no_rounding_grows_in_it),
    ("average never moves", TRAINER, "self.learner.weights, fresh)", "self.learner.weights, 0 * fresh)",
     objectives.test_every_stage_moves_its_model_and_averages_it),
)]


def copy_of_the_source(folder, change=None):
    """The shipped files in a folder, one of them changed."""
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    if change:
        text = (folder / change.file).read_text()
        found = text.count(change.old)
        assert found == 1, \
            f"stale mutant: {change.old!r} occurs {found} times in {change.file}, must be once. The code moved on: move the mutant"
        (folder / change.file).write_text(text.replace(change.old, change.new))
    return load_from(folder)


ARGUMENTS = {parallel.test_muons_iteration_is_its_polynomial_and_no_rounding_grows_in_it: dict(shape=(24, 8)),
             objectives.test_every_stage_moves_its_model_and_averages_it: dict(stage="tf"),
             streaming.test_dtype_is_kept: dict(attention="mla", dtype=torch.float64),
             streaming.test_device_is_kept_and_nothing_waits_for_it: dict(attention="mla"),
             rope.test_the_split_of_channels_is_the_papers: dict(channels=32, split=(6, 5, 5))}


def check(test, code):
    """Run a test of another file on `code`, without shrinking what it finds."""
    getattr(test, "hunt", test)(code=code, **ARGUMENTS.get(test, {}))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: re.sub(r"\W+", "-", mutant.name).strip("-"))
def test_a_broken_line_is_noticed(mutant, tmp_path):
    code = copy_of_the_source(tmp_path, mutant)
    try:
        check(mutant.test, code)
    except mutant.dies:
        return
    pytest.fail(f"SURVIVED: {mutant.name}. {mutant.file} with {mutant.new!r} for {mutant.old!r} passes {mutant.test.__name__}: that test "
                f"cannot fail where it should")


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}, key=lambda test: test.__name__),
                         ids=lambda test: test.__name__)
def test_an_unbroken_copy_passes(test, tmp_path):
    """Copying and importing break nothing: what kills a mutant is its one line."""
    check(test, copy_of_the_source(tmp_path))


def test_the_copies_leave_the_shipped_modules_alone(code, tmp_path):
    broken = copy_of_the_source(tmp_path, MUTANTS[0])
    import attention
    assert code.attention is attention and broken.attention is not attention and broken.attention.rotate is broken.rope3d.rotate
