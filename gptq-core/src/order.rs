//! In which order columns are quantised, and which group each belongs to.

use crate::config::GptqConfig;

/// In which order columns are quantised, and their groups: the same for whoever runs the column loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnOrder {
    /// `column[position]`: the original column that is quantised at this position.
    pub column: Vec<usize>,
    /// `group[position]`: the index of its scale and zero.
    pub group: Vec<usize>,
}

impl ColumnOrder {
    /// The order that `config` asks for, given the Hessian's diagonal (dead columns already set to 1).
    ///
    /// Sorts are stable, so that equal diagonal elements keep their natural order.
    #[must_use]
    pub fn new(config: &GptqConfig, diagonal: &[f64]) -> Self {
        let columns = diagonal.len();
        let group_size = config.group_size().map_or(columns, |g| g.get());
        let descending = |a: &usize, b: &usize| diagonal[*b].total_cmp(&diagonal[*a]);
        let mut column: Vec<usize> = (0..columns).collect();
        if config.desc_act() {
            column.sort_by(descending);
        } else if config.act_group_aware() {
            // The ragged tail group is no group of its own to the method: it stays where and as it is.
            let (whole, tail) = column.split_at_mut(columns - columns % group_size);
            let mut groups: Vec<&mut [usize]> = whole.chunks_exact_mut(group_size).collect();
            for group in &mut groups {
                group.sort_by(descending);
            }
            groups.sort_by(|a, b| descending(&a[0], &b[0]));
            column = groups
                .into_iter()
                .flat_map(|group| group.iter().copied())
                .chain(tail.iter().copied())
                .collect();
        }
        Self { group: groups(config, &column), column }
    }

    /// The same columns in the groups of other settings.
    pub(crate) fn regrouped(&self, config: &GptqConfig) -> Self {
        Self { column: self.column.clone(), group: groups(config, &self.column) }
    }

    /// `g_idx[original column]`.
    #[must_use]
    pub fn g_idx(&self) -> Vec<u32> {
        let mut g_idx = vec![0; self.column.len()];
        for (&column, &group) in self.column.iter().zip(&self.group) {
            g_idx[column] = u32::try_from(group).expect("invariant: fewer than 2^32 groups fit in memory");
        }
        g_idx
    }

    /// Whether columns stay in their natural order.
    #[must_use]
    pub fn is_natural(&self) -> bool {
        self.column.iter().enumerate().all(|(position, &column)| position == column)
    }
}

/// `group[position]` of columns in this order.
fn groups(config: &GptqConfig, column: &[usize]) -> Vec<usize> {
    let group_size = config.group_size().map_or(column.len(), |g| g.get());
    // Only dynamic groups under desc_act follow the order; all others are groups of neighbouring columns.
    let follows_order = config.desc_act() && !config.static_groups();
    let positions = column.iter().enumerate();
    positions
        .map(|(position, &original)| if follows_order { position } else { original } / group_size)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIAGONAL: [f64; 20] = [
        1.0, 5.0, 5.0, 0.0, 2.0, 2.0, 2.0, 2.0, // group 0, maximum 5
        9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0, // group 1, maximum 9
        7.0, 8.0, 9.0, 9.0, // ragged tail
    ];

    fn order(build: impl Fn(crate::GptqConfigBuilder) -> crate::GptqConfigBuilder) -> ColumnOrder {
        let config = build(GptqConfig::builder().group_size(Some(8))).build().expect("valid");
        ColumnOrder::new(&config, &DIAGONAL)
    }

    #[test]
    fn desc_act_sorts_stably_and_groups_follow() {
        let order = order(|c| c.desc_act(true));
        assert_eq!(order.column[..8], [8, 18, 19, 17, 16, 1, 2, 15]);
        assert_eq!(order.column[19], 3);
        let g_idx = order.g_idx();
        assert_eq!((g_idx[8], g_idx[18], g_idx[15], g_idx[3]), (0, 0, 0, 2));
    }

    #[test]
    fn static_groups_stay_natural_under_desc_act() {
        let order = order(|c| c.desc_act(true).static_groups(true));
        assert_eq!(order.column[..2], [8, 18]);
        assert_eq!(order.g_idx(), (0..20).map(|i| i / 8).collect::<Vec<u32>>());
    }

    #[test]
    fn group_aware_order_keeps_groups_whole_and_the_tail_in_place() {
        let order = order(|c| c.act_group_aware(true));
        assert_eq!(order.column[..4], [8, 15, 9, 10]);
        assert_eq!(order.column[8..16], [1, 2, 4, 5, 6, 7, 0, 3]);
        assert_eq!(order.column[16..], [16, 17, 18, 19]);
        assert_eq!(order.group[..1], [1]);
        assert_eq!(order.g_idx(), (0..20).map(|i| i / 8).collect::<Vec<u32>>());
    }
}
