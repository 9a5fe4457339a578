"""Rotations as vectors, matrices and six numbers, each pair of conversions one the inverse of the other."""

from __future__ import annotations

import numpy as np


def matrix_from_vector(vectors: np.ndarray) -> np.ndarray:
    """Return float64[..., 3, 3] for rotation vectors float[..., 3] (axis times angle, radians)."""
    vectors = np.asarray(vectors, dtype=np.float64)
    angle = np.linalg.norm(vectors, axis=-1)[..., None]
    # sin(angle / 2) / angle, which has a limit at 0 that numpy's sinc knows.
    x, y, z = np.moveaxis(vectors * np.sinc(angle / (2 * np.pi)) / 2, -1, 0)
    w = np.cos(angle[..., 0] / 2)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def vector_from_matrix(matrices: np.ndarray) -> np.ndarray:
    """Return float64[..., 3], radians, of length at most pi, for rotation matrices float[..., 3, 3].

    A half turn has two vectors, of which one is given; both mean the same rotation. Hands that point down are near it,
    so the way is by quaternions, which are as exact there as anywhere.
    """
    quaternions = _quaternion(np.asarray(matrices, dtype=np.float64))
    xyz, w = quaternions[..., :3], quaternions[..., 3:]
    sine = np.linalg.norm(xyz, axis=-1, keepdims=True)
    return xyz * np.where(sine > 0, 2 * np.arctan2(sine, w) / np.where(sine > 0, sine, 1), 2)


def six_from_matrix(matrices: np.ndarray) -> np.ndarray:
    """Return float64[..., 6], the first two rows of rotation matrices float[..., 3, 3].

    The continuous representation of Zhou et al. (CVPR 2019), in rows as pytorch3d and so diffusion_policy store it.
    """
    return np.asarray(matrices[..., :2, :], dtype=np.float64).reshape(*matrices.shape[:-2], 6)


def matrix_from_six(six: np.ndarray) -> np.ndarray:
    """Return float64[..., 3, 3], the rotation whose first two rows are nearest to float[..., 6] by Gram-Schmidt.

    A network's output need not be orthonormal; only two rows that are parallel or zero have no meaning.
    """
    first, second = np.asarray(six[..., :3], dtype=np.float64), np.asarray(six[..., 3:], dtype=np.float64)
    x = first / np.linalg.norm(first, axis=-1, keepdims=True)
    y = second - (x * second).sum(-1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], axis=-2)


def _quaternion(matrices: np.ndarray) -> np.ndarray:
    """Return float64[..., 4], unit (x, y, z, w) with w >= 0."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = ([matrices[..., row, column] for column in range(3)] for row in range(3))
    # Four times the outer product of the quaternion with itself: any row is the quaternion, the longest one exactly.
    rows = [
        [1 + xx - yy - zz, xy + yx, xz + zx, zy - yz],
        [xy + yx, 1 - xx + yy - zz, yz + zy, xz - zx],
        [xz + zx, yz + zy, 1 - xx - yy + zz, yx - xy],
        [zy - yz, xz - zx, yx - xy, 1 + xx + yy + zz],
    ]
    outer = np.stack([np.stack(row, -1) for row in rows], -2)
    longest = np.diagonal(outer, axis1=-2, axis2=-1).argmax(-1)
    chosen = np.take_along_axis(outer, longest[..., None, None], axis=-2)[..., 0, :]
    chosen = chosen / np.linalg.norm(chosen, axis=-1, keepdims=True)
    return np.where(chosen[..., 3:] < 0, -chosen, chosen)
