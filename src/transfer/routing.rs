//! Names of the queues of transfers.
//!
//! A queue name is built from database rows and compared. It is never parsed, since site and location names may contain
//! `_`.

/// Queue of a location for this stage: `{prefix}{site}_{location}_data_transfer`.
pub(crate) fn queue_name(prefix: &str, site_short_name: &str, location_name: &str) -> String {
    format!("{prefix}{site_short_name}_{location_name}_data_transfer")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::queue_name;

    #[rstest]
    #[case("", "cologne", "buffer", "cologne_buffer_data_transfer")]
    #[case(
        "",
        "ccat",
        "telescope_computer",
        "ccat_telescope_computer_data_transfer"
    )]
    #[case("transfer.", "us", "buffer", "transfer.us_buffer_data_transfer")]
    fn documented_names(
        #[case] prefix: &str,
        #[case] site: &str,
        #[case] location: &str,
        #[case] expected: &str,
    ) {
        assert_eq!(queue_name(prefix, site, location), expected);
    }
}
