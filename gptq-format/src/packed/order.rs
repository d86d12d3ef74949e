//! The same layer with its features in another order.

use super::{PackError, PackedLinear, check_length};
use crate::bitstream::{RUN, pack_stream};

/// Output features that are moved at a time: rows of so many words stay in the first cache.
const TILE: usize = 512;

impl PackedLinear {
    /// The order of the input features in which the layer is not act-ordered: by group, and in a group as they are. `None`
    /// if the layer is not act-ordered, or if its groups are of other sizes than `group_size` each and what is left for the
    /// last: then there is no such order.
    pub fn group_order(&self) -> Option<Vec<u32>> {
        if !self.is_act_order() {
            return None;
        }
        let mut order: Vec<u32> = (0..self.in_features as u32).collect();
        order.sort_by_key(|&feature| self.g_idx[feature as usize]); // stable: in order inside a group
        let natural =
            |(i, &feature): (usize, &u32)| self.g_idx[feature as usize] as usize == i / self.group_size;
        order.iter().enumerate().all(natural).then_some(order)
    }

    /// The layer whose input feature `i` is this one's `order[i]`: for every `x`, it makes of `x[order[0]], x[order[1]], ..`
    /// what this one makes of `x[0], x[1], ..`.
    ///
    /// # Errors
    /// [`PackError::Length`] and [`PackError::Order`] unless `order` holds every input feature once.
    pub fn with_input_order(&self, order: &[u32]) -> Result<Self, PackError> {
        check_permutation(order, self.in_features)?;
        let mut qweight = vec![0; self.qweight.len()];
        let run_words = self.bits.get() as usize * self.out_features;
        for_each_chunk(&mut qweight, run_words, |run, words| {
            let end = order.len().min((run + 1) * RUN);
            self.gather_codes(&order[run * RUN..end], words);
        });
        let g_idx = order.iter().map(|&feature| self.g_idx[feature as usize]).collect();
        let (qzeros, scales, bias) = (self.qzeros.clone(), self.scales.clone(), self.bias.clone());
        Ok(Self { qweight, qzeros, scales, g_idx, bias, ..self.shape_alone() })
    }

    /// The layer whose output feature `i` is this one's `order[i]`.
    ///
    /// # Errors
    /// [`PackError::Length`] and [`PackError::Order`] unless `order` holds every output feature once.
    pub fn with_output_order(&self, order: &[u32]) -> Result<Self, PackError> {
        check_permutation(order, self.out_features)?;
        fn moved<T: Copy + Default + Send + Sync>(rows: &[T], order: &[u32]) -> Vec<T> {
            let mut moved = vec![T::default(); rows.len()];
            for_each_chunk(&mut moved, order.len(), |row, moved| {
                let row = &rows[row * order.len()..][..order.len()];
                moved.iter_mut().zip(order).for_each(|(moved, &feature)| *moved = row[feature as usize]);
            });
            moved
        }
        let zero_words = self.bits.words(self.out_features);
        let mut qzeros = vec![0; self.qzeros.len()];
        let zeros = moved(&self.unpack_zeros(), order);
        for (zeros, words) in zeros.chunks_exact(order.len()).zip(qzeros.chunks_exact_mut(zero_words)) {
            pack_stream(self.bits, zeros, words);
        }
        Ok(Self {
            qweight: moved(&self.qweight, order),
            qzeros,
            scales: moved(&self.scales, order),
            g_idx: self.g_idx.clone(),
            bias: self.bias.as_ref().map(|bias| moved(bias, order)),
            ..self.shape_alone()
        })
    }

    /// Words of up to [`RUN`] input features, zeros until now.
    fn gather_codes(&self, features: &[u32], words: &mut [u32]) {
        let (bits, outputs) = (self.bits.get() as usize, self.out_features);
        let mask = u32::from(self.bits.max_code());
        for first in (0..outputs).step_by(TILE) {
            let row = |word: usize| word * outputs + first..word * outputs + (first + TILE).min(outputs);
            for (i, &feature) in features.iter().enumerate() {
                let (from, to) = (feature as usize * bits, i * bits);
                let (shift, place) = (from % 32, to % 32);
                let low = &self.qweight[row(from / 32)];
                if shift + bits <= 32 && place + bits <= 32 {
                    let words = words[row(to / 32)].iter_mut().zip(low);
                    words.for_each(|(word, low)| *word |= (low >> shift & mask) << place);
                    continue;
                }
                // A code that ends in the next word has its upper bits there.
                let high = if shift + bits > 32 { &self.qweight[row(from / 32 + 1)] } else { low };
                let code = |(&low, &high): (&u32, &u32)| {
                    ((u64::from(low) | u64::from(high) << 32) >> shift) as u32 & mask
                };
                let codes = low.iter().zip(high).map(code);
                words[row(to / 32)].iter_mut().zip(codes).for_each(|(word, code)| *word |= code << place);
                if place + bits > 32 {
                    let codes = low.iter().zip(high).map(code);
                    let words = words[row(to / 32 + 1)].iter_mut().zip(codes);
                    words.for_each(|(word, code)| *word |= code >> (32 - place));
                }
            }
        }
    }

    /// The layer's sizes without anything in it.
    fn shape_alone(&self) -> Self {
        Self {
            qweight: Vec::new(),
            qzeros: Vec::new(),
            scales: Vec::new(),
            g_idx: Vec::new(),
            bias: None,
            ..*self
        }
    }
}

/// An error unless `order` holds each of `len` features once.
fn check_permutation(order: &[u32], len: usize) -> Result<(), PackError> {
    check_length("order", len, order.len())?;
    let mut seen = vec![false; len];
    for (index, &feature) in order.iter().enumerate() {
        match seen.get_mut(feature as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(PackError::Order { index, feature, features: len }),
        }
    }
    Ok(())
}

/// Runs `f(i, chunk)` for every `len` elements, on all cores with the feature `rayon`.
fn for_each_chunk<T: Send>(data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    #[cfg(feature = "rayon")]
    {
        use rayon::prelude::*;
        data.par_chunks_mut(len).enumerate().for_each(|(i, chunk)| f(i, chunk));
    }
    #[cfg(not(feature = "rayon"))]
    data.chunks_mut(len).enumerate().for_each(|(i, chunk)| f(i, chunk));
}
