//! Names of the queues that transfers travel through.
//!
//! A queue name is built from database rows and compared; it is never taken apart again, since
//! site and location names may hold `_` themselves.

/// The queue of a location for this stage: `{prefix}{site}_{location}_data_transfer`.
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
